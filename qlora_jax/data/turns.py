"""Converts the turns of a data set's conversation to messages for a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.data import tools
from qlora_jax.data.field_names import (
    DETAIL_FIELDS,
    FUNCTION_CALL,
    MARK_FIELDS,
    ROLES,
    TURN_FIELDS,
    TURN_PAIRS,
)
from qlora_jax.data.values import is_empty, is_list, list_of, listed, short, structure, text
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.messages import REASONING, Message

KNOWN_ROLES = "user, assistant, system or tool"


def messages(turns: Any, where: str) -> tuple[list[Message], set[int]]:
    """Reads a conversation.

    Args:
      turns: list of turns, or a JSON string of such a list.
      where: file, line and field, for error messages.

    Returns:
      The messages, and the positions of the assistant's messages that are marked to carry no loss.

    Raises:
      UserError: a turn cannot be read; the message names its position, counted from 0.
    """
    found = structure(turns)
    if not is_list(found) or not found:
        raise UserError(f"{where} must be a list of turns, not {short(turns)}")
    out: list[Message] = []
    without_loss: set[int] = set()
    for number, turn in enumerate(found):
        for message, has_loss in _turn(turn, f"{where}[{number}]"):
            if not has_loss and message["role"] == "assistant":
                without_loss.add(len(out))
            out.append(message)
    return out, without_loss


def history(value: Any, where: str) -> list[Message]:
    """Reads LLaMA-Factory's `history`: a list of [question, answer].

    Raises:
      UserError: the value is not a list of [question, answer].
    """
    pairs = list_of("[question, answer]", value, where)
    out: list[Message] = []
    for number, pair in enumerate(pairs):
        place = f"{where}[{number}]"
        if not is_list(pair) or len(pair) != 2:
            raise UserError(f"{place} must be [question, answer], not {short(pair)}")
        for role, content in zip(("user", "assistant"), pair):
            out.append({"role": role, "content": text(content, place)})
    return out


def _turn(turn: Any, where: str) -> list[tuple[Message, bool]]:
    """Returns (message, has_loss) of a turn; a turn with a question and an answer gives two."""
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: a turn must be an object, not {short(turn)}")
    turn = {key: value for key, value in turn.items() if value is not None}
    pair = next((p for p in TURN_PAIRS if p[0] in turn and p[1] in turn), None)
    if pair is None or "role" in turn or "from" in turn:
        return [_message(turn, where)]
    if more := [key for key in turn if key not in pair]:
        raise UserError(
            f"{where}: {listed(dict.fromkeys(more))} next to {pair[0]} and {pair[1]}; write two "
            "turns with role and content"
        )
    question, answer = (content(turn[name], f"{where}.{name}") for name in pair)
    return [
        ({"role": "user", "content": question}, True),
        ({"role": "assistant", "content": answer}, True),
    ]


def _message(turn: Mapping[str, Any], where: str) -> tuple[Message, bool]:
    who, what = _names(turn)
    if who not in turn:
        raise UserError(f"{where}: {who} is missing; the turn has {listed(turn)}")
    given = turn[who]
    name = given.strip().lower() if isinstance(given, str) else None
    if name not in ROLES:
        raise UserError(f"{where}: unknown {who} {short(given)}; name it {KNOWN_ROLES}")
    role = ROLES[name]
    rest = {key: value for key, value in turn.items() if key not in (who, what)}
    has_loss = _has_loss(rest, role, where)
    body = turn.get(what)
    called = _calls(rest, where)
    if name == FUNCTION_CALL:
        called, body = [*called, *tools.calls(body, f"{where}.{what}")], None
    if called and role != "assistant":
        raise UserError(f"{where}: tool_calls in a turn of {role}; move them to the assistant")
    if body is None and not called:
        raise UserError(f"{where}: {what} is missing or null; the turn has {listed(turn)}")
    message: dict[str, Any] = {
        "role": role,
        "content": None if body is None else content(body, f"{where}.{what}"),
    }
    if called:
        message["tool_calls"] = called
    return message | _reasoning(rest) | rest, has_loss


def _names(turn: Mapping[str, Any]) -> tuple[str, str]:
    both = (pair for pair in TURN_FIELDS if pair[0] in turn and pair[1] in turn)
    who = (pair for pair in TURN_FIELDS if pair[0] in turn)
    return next(both, None) or next(who, None) or TURN_FIELDS[0]


def content(value: Any, where: str) -> str:
    """Returns the text of a turn: the string, or the joined text of OpenAI's content parts.

    Raises:
      UserError: the value is neither a string nor a list of parts, or a part is not text, such as
        an image.
    """
    if not is_list(value) or not value:
        return text(value, where)
    return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind not in (None, "text"):
            raise UserError(f"{where}: a part of type {short(kind)}; only text can be trained on")
        if isinstance(part.get("text"), str):
            return text(part["text"], where)
    raise UserError(f'{where} must be {{"type": "text", "text": ...}}, not {short(part)}')


def _calls(rest: dict[str, Any], where: str) -> Sequence[Any]:
    """Removes the tool calls from the turn's other keys, and returns them."""
    newer, older = rest.pop("tool_calls", None), rest.pop("function_call", None)
    if not is_empty(newer) and not is_empty(older):
        raise UserError(f"{where}: both tool_calls and function_call; remove one")
    if not is_empty(newer):
        return tools.calls(newer, f"{where}.tool_calls")
    return [] if is_empty(older) else tools.calls(older, f"{where}.function_call")


def _has_loss(rest: dict[str, Any], role: str, where: str) -> bool:
    """Removes the loss marks from the turn's other keys; returns whether the turn has loss."""
    for key in DETAIL_FIELDS:
        if not is_empty(rest.pop(key, None)):
            raise UserError(f"{where}: {key}: loss on parts of a turn is not supported; use train")
    marks = {key: rest.pop(key) for key in MARK_FIELDS if key in rest}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{where}: {key} must be true, false, 0 or 1, not {short(value)}")
        if value and role != "assistant":
            raise UserError(
                f"{where}: {key} {short(value)} in a turn of {role}; "
                "only the assistant's turns carry loss: remove it"
            )
    if len(set(map(bool, marks.values()))) > 1:
        raise UserError(f"{where}: {listed(marks)} contradict each other; remove one")
    return all(marks.values())


def _reasoning(rest: Mapping[str, Any]) -> dict[str, Any]:
    found = next((rest[k] for k in REASONING if isinstance(rest.get(k), str)), None)
    return {} if found is None else {REASONING[0]: found}
