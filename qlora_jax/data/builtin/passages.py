"""Cuts one long document into passages, so that a part of it can be held out."""

import re
from collections.abc import Iterator

BREAKS = tuple(re.compile(p) for p in (r"\n[ \t\r]*\n\s*", r"\n", r"(?<=[.!?]) +", r"\s"))
"""Patterns of places to cut, best first: between paragraphs, lines, sentences, words."""


def passages(text: str, size: int) -> Iterator[str]:
    """Yields passages of `size` to `2 * size` characters; together they are the whole text.

    Each passage ends at the best kind of break in this range. If there is no break, it ends after
    `2 * size` characters. The last passage is the remaining text and may be shorter than `size`.
    """
    start = 0
    while len(text) - start > 2 * size:
        low, high = start + size, start + 2 * size
        found = (b.search(text, low, high) for b in BREAKS)
        end = next((m.end() for m in found if m), high)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
