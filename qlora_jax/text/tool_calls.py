"""Converts tool calls to the form that a chat template needs.

In OpenAI's format and in most data, a call's arguments are JSON text. Most templates convert an
object to JSON and would quote a JSON text twice; some templates need the text. A turn with a tool
call has no content. Some templates check whether the content is null; others would write "None".
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.messages import Message


class Form(NamedTuple):
    """The form of a turn with tool calls that a template needs.

    Attributes:
      null: True: a missing content is None; False: it is an empty string.
      objects: True: arguments are objects; False: they are JSON text.
    """

    null: bool
    objects: bool


FORMS = (Form(True, True), Form(False, True), Form(True, False), Form(False, False))
KEY, VALUE = "probe_key", "probe value"
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "type": "function",
                "id": "123456789",
                "function": {"name": "probe_name", "arguments": {KEY: VALUE}},
            }
        ],
    },
)


def form(render: Callable[[Sequence[Message]], str]) -> Form | None:
    """Returns the form with which a template writes tool calls correctly; None if there is none.

    Args:
      render: function that renders turns with the template; raises UserError if the template
        refuses them.
    """
    for each in FORMS:
        try:
            text = render(written(PROBE, each))
        except UserError:
            continue
        quoted_twice = f'\\"{KEY}' in text
        as_python = f"'{KEY}'" in text
        if VALUE in text and "None" not in text and not quoted_twice and not as_python:
            return each
    return None


def written(messages: Sequence[Message], form: Form) -> tuple[Message, ...]:
    """Returns the turns with their tool calls converted to a form."""
    return tuple(
        _turn(message, form) if message.get("tool_calls") else message for message in messages
    )


def _turn(message: Message, form: Form) -> Message:
    calls = [_call(call, form.objects) for call in message["tool_calls"]]
    content = message.get("content")
    if content is None and not form.null:
        content = ""
    return {**message, "content": content, "tool_calls": calls}


def _call(call: Any, objects: bool) -> Any:
    """Returns a call with its arguments, if any, as an object or as JSON text."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call(function, objects)}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    if objects and isinstance(arguments, str):
        arguments = _object(arguments)
    elif not objects and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "arguments": arguments}


def _object(text: str) -> Any:
    try:
        found = json_files.parse(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text
