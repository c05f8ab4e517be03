"""Patterns of module paths, matched as PEFT matches them."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import regex

T = TypeVar("T")

MATCHING = 1
"""Seconds that a pattern may take; the `re` module has no such limit."""


class BadPattern(ValueError):
    """A pattern cannot be used; the text says which one and why."""


def named(path: str, name: str) -> bool:
    """Whether a path is the name, or ends in it after a dot."""
    return path == name or path.endswith(f".{name}")


def ends_in(path: str, pattern: str) -> bool:
    """Whether a regular expression matches the whole path, or its end after a dot.

    Raises:
      BadPattern: as `match`.
    """
    return match(path, pattern, around=r"(.*\.)?({})") is not None


def match(path: str, pattern: str, around: str = "{}") -> regex.Match[str] | None:
    """Matches a regular expression with the whole path.

    Args:
      path: the path.
      pattern: the expression.
      around: an expression in which {} stands for the pattern.

    Raises:
      BadPattern: the pattern is no regular expression, or takes longer than `MATCHING` seconds.
    """
    try:
        return regex.fullmatch(around.replace("{}", pattern), path, timeout=MATCHING)
    except TimeoutError:
        raise BadPattern(
            f"pattern {pattern!r:.80} takes over {MATCHING} s to match {path}; simplify it"
        ) from None
    except regex.error as e:
        raise BadPattern(f"{pattern!r:.80} is not a regular expression: {e}") from None


def first_match(patterns: Mapping[str, T], paths: Sequence[str], default: T) -> T:
    """Returns the value of the first pattern that a path ends in; else the default.

    Args:
      patterns: regular expressions to values.
      paths: the names of one module.
      default: the value for a path that no pattern matches.

    Raises:
      BadPattern: as `ends_in`.
    """
    return next(
        (v for pattern, v in patterns.items() if any(ends_in(path, pattern) for path in paths)),
        default,
    )
