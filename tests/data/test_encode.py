import numpy as np
import pytest

from qlora_jax.data.encode import encode, mark
from qlora_jax.data.records import Chat, Prompt, Text
from qlora_jax.errors import UserError


def chat(*turns, where="chat.jsonl:1"):
    return Chat(messages=tuple({"role": r, "content": c} for r, c in turns), where=where)


QA = chat(("user", "What does it do?"), ("assistant", "It returns Paris."))
TWO = chat(
    ("user", "hello"), ("assistant", "Yes,  no"), ("user", "and?"), ("assistant", "héllo 日本 🎉")
)


def runs(example, tokenizer):
    """The decoded runs of targets: what the model is asked to write."""
    edges = np.flatnonzero(np.diff(example.target.astype(int))) + 1
    parts = zip(np.split(example.ids, edges), np.split(example.target, edges))
    return [tokenizer.decode(i, skip_special_tokens=False) for i, t in parts if t[0]]


def one(record, tokenizer, config):
    examples, _ = encode([record], tokenizer, config)
    assert len(examples) == 1
    return examples[0]


def test_chat_targets_are_the_answers_and_their_end_of_turn(tokenizer, data_config):
    example = one(TWO, tokenizer, data_config())
    assert runs(example, tokenizer)[0] == "Yes,  no<|im_end|>"
    assert runs(example, tokenizer)[1].startswith("héllo 日本 🎉<|im_end|>")
    text = tokenizer.decode(example.ids, skip_special_tokens=False)
    assert text.startswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nYes,  no<|im_"
    )
    assert example.ids.dtype == np.int32
    assert example.target.dtype == np.bool_
