"""Turns records into the text to tokenize, and finds the answers in this text."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.config import DataConfig
from qlora_jax.data.records import Chat, Prompt, Record, Text
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tool_calls
from qlora_jax.text.chat import LocatedAnswers, Span, render_with_answers
from qlora_jax.text.ignored import ignored
from qlora_jax.text.messages import Message, Variables
from qlora_jax.text.tokenizer import NO_VARIABLES, Tokenizer

UNWRITTEN = "which the chat template does not write"
WITHIN = (
    "in the text of a turn, and the tokenizer reads it as a special token; remove it from the "
    "data, or set data.template: none if the prompts are formatted already"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordText:
    """The text of a record, and the rules to tokenize it.

    Attributes:
      text: text to tokenize.
      answers: function that takes a character position and returns the answers that start before
        it; raises UserError if an answer cannot be located.
      bos: True: the ids start with a begin-of-text id if the tokenizer uses one.
      eos: True: the ids end with an end-of-text id, unless the last answer already ends with a
        token that stops generation.
      chunked: True: a text that is too long becomes several examples; False: it is cut.
      notes: warnings about the record, each without the count in front.
    """

    text: str
    answers: Callable[[int], LocatedAnswers]
    bos: bool
    eos: bool
    chunked: bool = False
    notes: Sequence[str] = ()


class TemplateInput(NamedTuple):
    """The input of the chat template for one conversation.

    Attributes:
      messages: turns of the conversation.
      variables: further input of the template.
      without_loss: positions of the assistant's turns that carry no loss.
    """

    messages: tuple[Message, ...]
    variables: Variables = NO_VARIABLES
    without_loss: frozenset[int] = frozenset()


def conversation(record: Record, tokenizer: Tokenizer, config: DataConfig) -> TemplateInput | None:
    """Returns the input of the chat template, or None for a record that uses no template.

    Raises:
      UserError: the record holds tool calls, and the chat template writes no tool calls.
    """
    if isinstance(record, Chat):
        found = TemplateInput(record.messages, record.variables, record.without_loss)
    elif isinstance(record, Prompt) and config.template == "auto" and tokenizer.has_chat_template:
        found = TemplateInput(
            (
                {"role": "user", "content": record.prompt},
                {"role": "assistant", "content": record.completion},
            )
        )
    else:
        return None
    if config.system_prompt is not None and found.messages[0]["role"] != "system":
        found = found._replace(
            messages=({"role": "system", "content": config.system_prompt}, *found.messages),
            without_loss=frozenset(turn + 1 for turn in found.without_loss),
        )
    if not any(message.get("tool_calls") for message in found.messages):
        return found
    form = tokenizer.tool_call_form
    if form is None:
        raise _unwritten("tool_calls", tokenizer)
    return found._replace(messages=tool_calls.written(found.messages, form))


def _unwritten(name: str, tokenizer: Tokenizer) -> UserError:
    return UserError(
        f"the chat template of {tokenizer.template_source} does not write its {name}; give one "
        f"that does as data.chat_template, or take {name} out of the data"
    )


def lay_out(record: Record, tokenizer: Tokenizer, config: DataConfig) -> RecordText:
    """Returns the text of a record and the positions of its answers.

    Raises:
      UserError: the conversation cannot be rendered.
    """
    chat = conversation(record, tokenizer, config)
    if chat is not None:
        return _lay_out_chat(chat, tokenizer)
    if isinstance(record, Prompt):
        prompt = raw_prompt(record.prompt, config.system_prompt)
        text, start = prompt + record.completion, len(prompt)
        return RecordText(text=text, answers=_always([(start, len(text))]), bos=True, eos=True)
    assert isinstance(record, Text)
    text = record.text
    return RecordText(
        text=text, answers=_always([(0, len(text))]), bos=True, eos=record.ends, chunked=True
    )


def _lay_out_chat(chat: TemplateInput, tokenizer: Tokenizer) -> RecordText:
    unread = ignored(
        chat.messages, chat.variables, lambda m, variables: tokenizer.render(m, False, variables)
    )
    for name in ("tool_calls", "tools"):
        if name in unread:
            raise _unwritten(name, tokenizer)
    text, answers = render_with_answers(chat.messages, tokenizer, chat.variables, chat.without_loss)
    return RecordText(
        text=text,
        answers=answers,
        bos=False,
        eos=chat.messages[-1]["role"] == "assistant",
        notes=[
            *(f"conversations hold {name}, {UNWRITTEN}" for name in unread),
            *(f"conversations hold {token!r} {WITHIN}" for token in _marks(chat, tokenizer)),
        ],
    )


def _marks(chat: TemplateInput, tokenizer: Tokenizer) -> list[str]:
    """Returns the begin-of-text and end-of-turn tokens that occur in the content of a turn."""
    texts = [m["content"] for m in chat.messages if isinstance(m.get("content"), str)]
    tokens = {*tokenizer.stop_texts, tokenizer.fast.bos_token} - {None}
    return sorted(token for token in tokens if any(token in text for text in texts))


def _always(spans: list[Span]) -> Callable[[int], LocatedAnswers]:
    return lambda end: LocatedAnswers(spans, [], {})


def raw_prompt(prompt: str, system_prompt: str | None) -> str:
    """Returns a prompt for use without a chat template: the system prompt, then the prompt."""
    return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt
