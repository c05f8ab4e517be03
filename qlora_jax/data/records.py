"""What one training example is before tokenization, and how a row of a data set becomes one."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.messages import Message, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; the assistant's turns are the answers.

    Attributes:
      messages: the turns.
      variables: further input of the chat template.
      without_loss: positions of assistant's turns that carry no loss.
      where: file and line, or row, for messages.
    """

    messages: tuple[Message, ...]
    variables: Variables = dataclasses.field(default_factory=dict)
    without_loss: frozenset[int] = frozenset()
    where: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> str:
        """The text that decides whether two records are the same."""
        turns = "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)
        further = [
            {k: v for k, v in m.items() if k not in ("role", "content")} for m in self.messages
        ]
        if not any(further) and not self.variables:
            return turns
        return f"{turns}\n{json.dumps([further, self.variables], sort_keys=True, default=str)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and the completion that answers it."""

    prompt: str
    completion: str
    where: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> str:
        return f"{self.prompt}\n{self.completion}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text; `ends` says that the document ends here and is not continued elsewhere."""

    text: str
    ends: bool = True
    where: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> str:
        return self.text


Record = Chat | Prompt | Text
Row = Mapping[str, Any]
Parser = Callable[[Row, str], Record]

CHAT_FIELDS = ("messages", "conversations", "conversation")
PROMPT_FIELDS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
CONTEXT_FIELDS = ("input", "context")
TEXT_FIELDS = ("text", "content")
TURN_FIELDS = (("role", "content"), ("from", "value"))
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Names that data sets give to the turns, and the ones that chat templates know."""


def parser(fields: Sequence[str], format: str, where: str) -> Parser:
    """Chooses how rows become records.

    Args:
      fields: names of the fields of the first row.
      format: chat, prompt or text, or auto: the first of these whose fields are there.
      where: the data set, for messages.

    Raises:
      UserError: the fields of that format are not there; those found are listed.
    """
    for kind, find in FINDERS.items():
        if format in ("auto", kind) and (parse := find(fields)):
            return parse
    wanted = {
        "chat": " or ".join(CHAT_FIELDS[:2]),
        "prompt": "prompt and completion (or instruction and output, question and answer)",
        "text": "text",
    }
    need = wanted.get(format) or "; or ".join(wanted.values())
    raise UserError(
        f"{where}: the fields are {', '.join(fields) or 'none'}; "
        f"data.format {format} needs {need}; rename them"
    )


def _find_chat(fields: Sequence[str]) -> Parser | None:
    name = next((n for n in CHAT_FIELDS if n in fields), None)
    if name is None:
        return None

    def parse(row: Row, where: str) -> Chat:
        turns = _field(row, name, where)
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise UserError(f"{where}: {name} must be a list of turns, not {_short(turns)}")
        return Chat(
            messages=tuple(_message(t, f"{where}: {name}[{i}]") for i, t in enumerate(turns)),
            where=where,
        )

    return parse


def _find_prompt(fields: Sequence[str]) -> Parser | None:
    pair = next((p for p in PROMPT_FIELDS if all(n in fields for n in p)), None)
    if pair is None:
        return None
    ask, answer = pair
    context = next((n for n in CONTEXT_FIELDS if n in fields), None)
    if ask != "instruction":
        context = None

    def parse(row: Row, where: str) -> Prompt:
        prompt = _string(row, ask, where)
        if context and row.get(context):
            prompt = f"{prompt}\n\n{_string(row, context, where)}"
        return Prompt(prompt=prompt, completion=_string(row, answer, where), where=where)

    return parse


def _find_text(fields: Sequence[str]) -> Parser | None:
    name = next((n for n in TEXT_FIELDS if n in fields), None)
    if name is None:
        return None
    return lambda row, where: Text(text=_string(row, name, where), where=where)


FINDERS: Mapping[str, Callable[[Sequence[str]], Parser | None]] = {
    "chat": _find_chat,
    "prompt": _find_prompt,
    "text": _find_text,
}


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: a turn must be an object, not {_short(turn)}")
    pair = next((p for p in TURN_FIELDS if p[0] in turn), TURN_FIELDS[0])
    role, content = _field(turn, pair[0], where), _field(turn, pair[1], where)
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"{where}: unknown {pair[0]} {_short(role)}; the known ones are {', '.join(ROLES)}"
        )
    return {"role": ROLES[role], "content": _content(content, f"{where}.{pair[1]}")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [p.get("text") for p in content if isinstance(p, Mapping)]
        texts = [p for p in parts if isinstance(p, str)]
        if texts and len(texts) == len(content):
            return "".join(texts)
    return _text(content, where)


def _string(row: Row, name: str, where: str) -> str:
    return _text(_field(row, name, where), f"{where}: {name}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, not {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where} has half a surrogate pair at character {e.start}") from None
    return value


def _field(row: Row, name: str, where: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: no {name} in it; it has {', '.join(map(str, row)) or 'nothing'}")
    return row[name]


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
