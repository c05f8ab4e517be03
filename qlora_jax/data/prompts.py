"""What a model is given to answer: for samples during training, and for generation."""

import dataclasses
import json

from qlora_jax.config import DataConfig
from qlora_jax.data.layouts import conversation, raw_prompt
from qlora_jax.data.records import Prompt, Record, Text
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.messages import Message
from qlora_jax.text.tokenizer import Tokenizer

TEXT_PROMPT = 32


@dataclasses.dataclass(frozen=True)
class SamplePrompt:
    """A prompt as the model sees it.

    Attributes:
      ids: token ids, up to where generation starts.
      prompt: the prompt as a person would write it: the last turn before the answer.
      answer: what the data has in answer; empty for a prompt that a user typed.
    """

    ids: list[int]
    prompt: str
    answer: str


def question(record: Record, tokenizer: Tokenizer, config: DataConfig) -> SamplePrompt | None:
    """The last answer of an example as a question, tokenized as in training; None if it has none.

    Of a plain text the first 32 tokens, at most half of it, are the prompt and the rest the answer.

    Raises:
      UserError: the conversation cannot be rendered; the record's place is named.
    """
    if isinstance(record, Text):
        ids = tokenizer.encode(record.text)
        cut = min(TEXT_PROMPT, len(ids) // 2)
        prompt, answer = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])
        return SamplePrompt(tokenizer.with_bos(ids[:cut]), prompt, answer) if cut else None
    chat = conversation(record, tokenizer, config)
    if chat is None:
        assert isinstance(record, Prompt)
        ids = _raw(record.prompt, tokenizer, config.system_prompt)
        return SamplePrompt(ids, record.prompt, record.completion)
    messages = chat.messages
    turn = max((i for i, m in enumerate(messages) if i and m["role"] == "assistant"), default=0)
    if not turn:
        return None
    try:
        text = tokenizer.render(messages[:turn], True, chat.variables)
    except UserError as e:
        raise UserError(f"{record.where}: {e}") from None
    return SamplePrompt(tokenizer.encode(text), _shown(messages[turn - 1]), _shown(messages[turn]))


def _shown(message: Message) -> str:
    """Returns a turn for people to read: its content, or its tool calls."""
    return message.get("content") or json.dumps(message.get("tool_calls", ""), ensure_ascii=False)


def ask(
    prompt: str, tokenizer: Tokenizer, *, system_prompt: str | None = None, template: str = "auto"
) -> SamplePrompt:
    """A prompt that a user typed: through the chat template if there is one, else as it is.

    Raises:
      UserError: the template refuses it, as some do a system turn.
    """
    if template == "none" or not tokenizer.has_chat_template:
        return SamplePrompt(_raw(prompt, tokenizer, system_prompt), prompt, "")
    system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    text = tokenizer.render([*system, {"role": "user", "content": prompt}], True)
    return SamplePrompt(tokenizer.encode(text), prompt, "")


def _raw(prompt: str, tokenizer: Tokenizer, system_prompt: str | None) -> list[int]:
    return tokenizer.with_bos(tokenizer.encode(raw_prompt(prompt, system_prompt)))
