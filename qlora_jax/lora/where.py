"""Selects parts of a tree or a model by their paths."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from qlora_jax.lora.patterns import BadPattern, match
from qlora_jax.runtime.errors import UserError

T = TypeVar("T")

Where = str | Sequence[str] | Callable[[str, Any], bool]
"""A selection of parts: a regular expression that matches the whole path, a list of names, or a
function (path, part) that returns bool. A name is one or more consecutive components of a path,
such as "query" or "attn.query"."""

LISTED = 20
"""Largest number of paths that an error message lists."""


def chosen(where: Where, parts: Mapping[str, T], what: str) -> dict[str, T]:
    """Returns the selected parts, in the order of `parts`, and requires at least one.

    Args:
      where: selection of the parts.
      parts: path to part, such as the module that owns a weight.
      what: plural noun for the parts in error messages, such as "leaves".

    Raises:
      UserError: the expression is malformed, or the selection or one of its names matches nothing.
    """
    if not callable(where) and not isinstance(where, str):
        for name in where:
            if not any(_has(path, name) for path in parts):
                raise UserError(f"where: {name!r} names none of the {what}; {_listed(parts)}")
    found = matching(where, parts)
    if not found:
        raise UserError(f"where: {where!r} matches none of the {what}; {_listed(parts)}")
    return found


def matching(where: Where, parts: Mapping[str, T]) -> dict[str, T]:
    """Returns the selected parts, in the order of `parts`; the result may be empty.

    Raises:
      UserError: the expression is malformed.
    """
    if callable(where):
        return {path: part for path, part in parts.items() if where(path, part)}
    if isinstance(where, str):
        return {path: part for path, part in parts.items() if _matches(path, where)}
    return {p: part for p, part in parts.items() if any(_has(p, name) for name in where)}


def _matches(path: str, pattern: str) -> bool:
    try:
        return match(path, pattern) is not None
    except BadPattern as e:
        raise UserError(f"where: {e}; correct it, or give a list of names") from None


def _has(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."


def _listed(paths: Collection[str]) -> str:
    return f"there are {named(paths)}" if paths else "there are none"


def named(paths: Collection[str]) -> str:
    """Returns the first `LISTED` paths as text for a message, with the number of the others."""
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(list(paths)[:LISTED]) + more
