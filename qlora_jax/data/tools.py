"""Converts tools and tool calls to the form that chat templates read."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.data.values import is_empty, is_list, list_of, short, structure, text
from qlora_jax.runtime.errors import UserError

FORM = '{"type": "function", "function": {"name": ...}}'


def tools(value: Any, where: str) -> list[Any]:
    """Returns the tools of a conversation in the form of OpenAI's API.

    Args:
      value: list of tools in OpenAI's form, or list of function schemas, or a JSON string of such
        a list.
      where: file, line and field, for messages.

    Raises:
      UserError: the value has another form.
    """
    found = list_of("tools", value, where)
    return [_function(structure(tool), f"{where}[{i}]") for i, tool in enumerate(found)]


def calls(value: Any, where: str) -> list[Any]:
    """Returns the tool calls of one turn in OpenAI's form, with their arguments as objects.

    Args:
      value: list of calls or one call, each in OpenAI's form or as `{"name", "arguments"}`, or a
        JSON string of these.
      where: file, line, turn and key, for messages.

    Raises:
      UserError: the value has another form, or the arguments of a call are not a JSON object.
    """
    found = structure(value)
    if isinstance(found, Mapping):
        found = [found]
    if not is_list(found):
        raise UserError(f"{where} must be a list of calls in JSON, not {short(value)}")
    return [_call(structure(call), f"{where}[{i}]") for i, call in enumerate(found)]


def _call(call: Any, where: str) -> Any:
    call = _function(call, where)
    function = {k: v for k, v in call["function"].items() if v is not None}
    arguments = structure(function.get("arguments"))
    if is_empty(arguments):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: arguments must be a JSON object, not {short(arguments)}")
    return {**call, "function": {**function, "arguments": arguments}}


def _function(value: Any, where: str) -> dict[str, Any]:
    """Returns a tool or call in OpenAI's form: name and other parts under `function`."""
    if isinstance(value, Mapping):
        value = {k: v for k, v in value.items() if v is not None}
        inner = value.get("function")
        if isinstance(inner, Mapping) and "name" in inner:
            text(inner["name"], f"{where}: the function's name")
            return {"type": "function", **value}
        if inner is None and "name" in value:
            text(value["name"], f"{where}: the function's name")
            outer = {k: v for k, v in value.items() if k in ("id", "type")}
            rest = {k: v for k, v in value.items() if k not in outer}
            return {"type": "function", **outer, "function": rest}
    raise UserError(f"{where} must be {FORM}, not {short(value)}")
