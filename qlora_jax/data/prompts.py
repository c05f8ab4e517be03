"""Makes prompts for the model: for samples during training, and for generation."""

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
    """A prompt for generation, as token ids and as text.

    Attributes:
      ids: token ids of the whole prompt; generation starts after the last id.
      prompt: prompt without the chat template: the last turn before the answer.
      answer: answer in the data; empty for a prompt that a user typed.
    """

    ids: list[int]
    prompt: str
    answer: str


def question(record: Record, tokenizer: Tokenizer, config: DataConfig) -> SamplePrompt | None:
    """Returns the prompt of a record's last answer, tokenized as in training.

    For a plain text, the prompt is the first 32 tokens, but at most half of the text. The answer
    is the remaining text.

    Returns:
      The prompt and its answer; None if the record has no answer.

    Raises:
      UserError: the conversation cannot be rendered; the message names the record's place.
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
    """Returns a turn as readable text: its content, or its tool calls as JSON."""
    return message.get("content") or json.dumps(message.get("tool_calls", ""), ensure_ascii=False)


def ask(
    prompt: str, tokenizer: Tokenizer, *, system_prompt: str | None = None, template: str = "auto"
) -> SamplePrompt:
    """Returns the tokenized prompt of a user, in the chat template if the tokenizer has one.

    The template is not used if `template` is `none`.

    Raises:
      UserError: the template refuses the prompt; some templates refuse a system turn.
    """
    if template == "none" or not tokenizer.has_chat_template:
        return SamplePrompt(_raw(prompt, tokenizer, system_prompt), prompt, "")
    system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    text = tokenizer.render([*system, {"role": "user", "content": prompt}], True)
    return SamplePrompt(tokenizer.encode(text), prompt, "")


def _raw(prompt: str, tokenizer: Tokenizer, system_prompt: str | None) -> list[int]:
    return tokenizer.with_bos(tokenizer.encode(raw_prompt(prompt, system_prompt)))
