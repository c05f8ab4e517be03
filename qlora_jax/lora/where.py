"""Choosing parts of a tree or a model by their paths."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from qlora_jax.lora.patterns import BadPattern, match
from qlora_jax.runtime.errors import UserError

T = TypeVar("T")

Where = str | Sequence[str] | Callable[[str, Any], bool]
"""A regular expression that matches the whole path, a list of names, or a function of path and
part. A name is one or more components of a path that follow one another: "query",
"attn.query"."""

LISTED = 20
"""Paths that an error lists, at most."""


def chosen(where: Where, parts: Mapping[str, T], what: str) -> dict[str, T]:
    """Returns the parts that are asked for, in their order.

    Args:
      where: which.
      parts: path to part, such as the module that owns a weight.
      what: what the parts are, in the plural, for errors.

    Raises:
      UserError: a malformed expression, or one, or a name, that matches nothing.
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
    """Returns the parts that are asked for, in their order; there may be none.

    Raises:
      UserError: a malformed expression.
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
    """Lists paths for a message: the first `LISTED`, and how many more there are."""
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(list(paths)[:LISTED]) + more
