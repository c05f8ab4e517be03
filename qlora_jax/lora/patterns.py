"""Matches patterns with module paths, by the rules of PEFT."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import regex

T = TypeVar("T")

MATCHING = 1
"""Time limit in seconds for matching one pattern; the `re` module has no such limit."""


class BadPattern(ValueError):
    """A pattern that cannot be used; the message names the pattern and the reason."""


def named(path: str, name: str) -> bool:
    """Returns whether a path equals the name, or ends in a dot and the name."""
    return path == name or path.endswith(f".{name}")


def ends_in(path: str, pattern: str) -> bool:
    """Returns whether a regular expression matches the whole path, or the part after some dot.

    Raises:
      BadPattern: the pattern is no regular expression, or takes longer than `MATCHING` seconds.
    """
    return match(path, pattern, around=r"(.*\.)?({})") is not None


def match(path: str, pattern: str, around: str = "{}") -> regex.Match[str] | None:
    """Matches a regular expression with the whole path.

    Args:
      path: path of a module.
      pattern: regular expression.
      around: regular expression in which {} is replaced by the pattern.

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
    """Returns the value of the first pattern that matches the end of a path; else the default.

    Args:
      patterns: regular expression to value.
      paths: alternative paths of one module.
      default: value if no pattern matches.

    Raises:
      BadPattern: a pattern is no regular expression, or takes longer than `MATCHING` seconds.
    """
    return next(
        (v for pattern, v in patterns.items() if any(ends_in(path, pattern) for path in paths)),
        default,
    )
