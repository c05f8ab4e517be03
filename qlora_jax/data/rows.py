"""Converts a row of a data set to a record: a conversation, a prompt with completion, or text."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.data import tools, turns
from qlora_jax.data.field_names import (
    CHAT_FIELDS,
    CONTEXT_FIELDS,
    MEDIA_FIELDS,
    PREFERENCE_FIELDS,
    PROMPT_FIELDS,
    SYSTEM_FIELDS,
    TEXT_FIELDS,
    TOOL_FIELDS,
)
from qlora_jax.data.records import Chat, Prompt, Record, Text
from qlora_jax.data.values import Fields, is_empty, is_list, listed, short
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.messages import Message

NEEDED = {
    "chat": "messages or conversations",
    "prompt": "prompt and completion (or instruction and output, question and answer)",
    "text": "text",
}
"""Maps a format to the fields that it needs, in words."""
KEYWORDS = "chat_template_kwargs"
RESERVED = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "documents",
        "messages",
        "return_assistant_tokens_mask",
        "tokenize",
        "tools",
    )
)
"""Names of chat template inputs that the field `KEYWORDS` must not set."""


def parse(fields: Fields, format: str) -> Record:
    """Converts a row to a record.

    Fields that have a value in this row are tried before fields that are empty.

    Args:
      fields: fields of the row.
      format: chat, prompt or text; auto takes the first of these three whose fields are present.

    Raises:
      UserError: the fields of the format are missing or unusable; the message names the fields
        of the row.
    """
    for name in MEDIA_FIELDS:
        if fields.holds(name):
            raise UserError(f"{fields.where}: {name} in it; only text can be trained on: remove it")
    for present in (fields.holds, lambda name: name in fields.row):
        for kind, find in FINDERS.items():
            if format in ("auto", kind) and (make := find(fields, present)):
                return make(fields)
    if any(name in fields.row for name in PREFERENCE_FIELDS):
        raise UserError(
            f"{fields.where}: {' and '.join(PREFERENCE_FIELDS)} are preference data, which is not "
            "supported; rename the field of the chosen answer to completion (text, next to prompt) "
            "or messages (a conversation), and remove the other"
        )
    need = NEEDED.get(format) or "; or ".join(NEEDED.values())
    raise UserError(
        f"{fields.where}: the fields are {listed(fields.row)}; data.format {format} needs {need}; "
        "rename them"
    )


Present = Callable[[str], bool]
Maker = Callable[[Fields], Record]


def _find_chat(fields: Fields, present: Present) -> Maker | None:
    name = next((n for n in CHAT_FIELDS if present(n)), None)
    if name is not None:
        return functools.partial(_chat, name=name)
    return _conversational_pair if _is_conversational(fields, present) else None


def _find_prompt(fields: Fields, present: Present) -> Maker | None:
    if _is_conversational(fields, present):
        return _conversational_pair
    # An answer may be empty: if no pair has values, take a pair whose fields are not null.
    for there in (present, lambda name: fields.row.get(name) is not None):
        for ask, answer in PROMPT_FIELDS:
            if there(ask) and there(answer):
                return functools.partial(_prompt, ask=ask, answer=answer)
    return None


def _find_text(fields: Fields, present: Present) -> Maker | None:
    name = next((n for n in TEXT_FIELDS if present(n)), None)
    return None if name is None else functools.partial(_text, name=name)


FINDERS: Mapping[str, Callable[[Fields, Present], Maker | None]] = {
    "chat": _find_chat,
    "prompt": _find_prompt,
    "text": _find_text,
}


def _is_conversational(fields: Fields, present: Present) -> bool:
    """Returns whether there are a prompt that is a list (not a JSON string) and a completion."""
    return present("prompt") and present("completion") and is_list(fields.row["prompt"])


def _text(fields: Fields, name: str) -> Text:
    return Text(text=fields.text(name), where=fields.where)


def _chat(fields: Fields, name: str) -> Chat:
    messages, without_loss = turns.messages(fields.get(name), f"{fields.where}: {name}")
    return _conversation(fields, messages, without_loss)


def _conversational_pair(fields: Fields) -> Chat:
    """Reads TRL's prompt and completion as lists of turns; the prompt's turns carry no loss."""
    asked, _ = turns.messages(fields.get("prompt"), f"{fields.where}: prompt")
    answer = fields.get("completion")
    if not is_list(answer):
        raise UserError(
            f"{fields.where}: prompt is a list of turns and completion is {short(answer)}; give "
            "both as lists of turns, or both as strings"
        )
    answered, marked = turns.messages(answer, f"{fields.where}: completion")
    without_loss = {i for i, m in enumerate(asked) if m["role"] == "assistant"}
    without_loss |= {len(asked) + i for i in marked}
    return _conversation(fields, [*asked, *answered], without_loss)


def _prompt(fields: Fields, ask: str, answer: str) -> Record:
    parts = [fields.text(ask)]
    parts += [fields.text(n) for n in CONTEXT_FIELDS if n != ask and fields.holds(n)]
    prompt, completion = "\n\n".join(parts), fields.text(answer)
    earlier: list[Message] = []
    if fields.holds("history"):
        earlier = turns.history(fields.get("history"), f"{fields.where}: history")
    last: list[Message] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    chat = _conversation(fields, [*earlier, *last], set())
    if len(chat.messages) > len(last) or chat.variables:
        return chat
    return Prompt(prompt=prompt, completion=completion, where=fields.where)


def _conversation(fields: Fields, messages: list[Message], without_loss: set[int]) -> Chat:
    """Makes a conversation, with the row's system prompt and template variables."""
    system = _system(fields)
    if system is not None:
        first = messages[0]
        if first["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
            without_loss = {i + 1 for i in without_loss}
        elif first["content"] != system:
            raise UserError(
                f"{fields.where}: the system prompt {short(system)} differs from the system turn "
                f"{short(first['content'])}, which starts the conversation; remove one"
            )
    return Chat(
        messages=tuple(messages),
        variables=_variables(fields),
        without_loss=frozenset(without_loss),
        where=fields.where,
    )


def _system(fields: Fields) -> str | None:
    found = {fields.text(name) for name in SYSTEM_FIELDS if fields.holds(name)}
    if len(found) > 1:
        raise UserError(f"{fields.where}: {' and '.join(SYSTEM_FIELDS)} differ; remove one")
    return next(iter(found), None)


def _variables(fields: Fields) -> dict[str, Any]:
    """Returns further input of the chat template: tools, documents and `KEYWORDS` of the row."""
    where = fields.where
    variables = _keywords(fields)
    given = [name for name in TOOL_FIELDS if fields.holds(name)]
    if len(given) > 1:
        raise UserError(f"{where}: the row has both {' and '.join(given)}; remove one")
    for name in given:
        variables["tools"] = tools.tools(fields.get(name), f"{where}: {name}")
    if fields.holds("documents"):
        documents = fields.structure("documents")
        if not is_list(documents) or not all(isinstance(d, Mapping) for d in documents):
            raise UserError(
                f"{where}: documents must be a list of objects with title and text, not "
                f"{short(documents)}; give plain text as context"
            )
        variables["documents"] = list(documents)
    return {name: value for name, value in variables.items() if not is_empty(value)}


def _keywords(fields: Fields) -> dict[str, Any]:
    if not fields.holds(KEYWORDS):
        return {}
    found = fields.structure(KEYWORDS)
    if not isinstance(found, Mapping):
        raise UserError(f"{fields.where}: {KEYWORDS} must be an object, not {short(found)}")
    if taken := sorted(RESERVED & found.keys()):
        raise UserError(f"{fields.where}: {KEYWORDS} cannot give {', '.join(taken)}; remove it")
    return dict(found)
