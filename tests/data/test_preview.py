import io

import numpy as np
from rich.console import Console

from qlora_jax.data.encode import Example, encode
from qlora_jax.data.preview import preview
from qlora_jax.data.records import Chat, Text

CHAT = Chat(
    messages=(
        {"role": "user", "content": "Say [bold]hello"},
        {"role": "assistant", "content": "hello, 日本"},
    )
)


def test_targets_are_between_marks(tokenizer, data_config):
    examples, _ = encode([CHAT, Text(text="Paris")], tokenizer, data_config())
    text = preview(examples, tokenizer, 1).plain
    targets = int(examples[0].target.sum())
    assert text.startswith(f"example 1: {len(examples[0].ids)} tokens, {targets} with loss\n")
    assert (
        "user\nSay [bold]hello<|im_end|>\n<|im_start|>assistant\n⟦hello, 日本<|im_end|>⟧\n" in text
    )
    assert "ris" not in text
    assert "Pa⟦ris<|endoftext|>⟧" in preview(examples, tokenizer, 9).plain


def test_marks_survive_without_colour_and_colour_is_on_the_targets(tokenizer):
    ids = np.array(tokenizer.encode("no Yes"), np.int32)
    target = np.arange(len(ids)) >= len(tokenizer.encode("no"))
    shown = preview([Example(ids, target)], tokenizer, 1)
    (green,) = [s for s in shown.spans if s.style == "green"]
    assert shown.plain[green.start : green.end] == "⟦ Yes⟧"
    out = io.StringIO()
    Console(file=out, width=80).print(shown)
    assert "no⟦ Yes⟧" in out.getvalue()
    assert "\x1b" not in out.getvalue()
