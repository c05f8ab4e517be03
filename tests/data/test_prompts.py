import numpy as np
import pytest

from qlora_jax.data.encode import encode
from qlora_jax.data.prompts import ask, question
from qlora_jax.data.records import Chat, Prompt, Text

CHAT = Chat(
    messages=(
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Yes, no"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Paris."},
    )
)
PROMPT = Prompt(prompt="What?", completion=" Paris.")


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    ("record", "template"), [(CHAT, "auto"), (PROMPT, "auto"), (PROMPT, "none")]
)
def test_the_prompt_is_what_precedes_the_last_answer_in_training(
    tokenizer, data_config, record, template, system
):
    config = data_config(template=template, system_prompt=system)
    asked = question(record, tokenizer, config)
    (example,), _ = encode([record], tokenizer, config)
    first = len(example.target) - int(
        np.argmin(example.target[::-1][example.target[::-1].argmax() :])
    )
    start = first - int(example.target[::-1].argmax())
    assert asked.ids == example.ids[:start].tolist()
    assert (asked.prompt, asked.answer.strip()) == ("What?", "Paris.")


def test_a_text_is_continued(tokenizer, data_config):
    record = Text(text="The capital of France is Paris. " * 20)
    asked = question(record, tokenizer, data_config())
    assert len(asked.ids) == 32
    assert asked.prompt + asked.answer == record.text
    short = question(Text(text="It returns"), tokenizer, data_config())
    assert short.prompt
    assert short.answer


def test_no_answer_no_question(tokenizer, data_config):
    assert question(Chat(messages=CHAT.messages[:1]), tokenizer, data_config()) is None
    assert question(Text(text=""), tokenizer, data_config()) is None


def test_ask_goes_through_the_template(tokenizer):
    text = tokenizer.decode(ask("hello", tokenizer, system_prompt="s").ids, False)
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ask_without_template(make_tokenizer):
    tokenizer = make_tokenizer(None, "</s>", bos_token="<s>")
    assert tokenizer.decode(ask("hello", tokenizer).ids, False) == "<s>hello"
