"""Cuts one long document into passages, so that a part of it can be held out."""

import re
from collections.abc import Iterator

BREAKS = tuple(re.compile(p) for p in (r"\n[ \t\r]*\n\s*", r"\n", r"(?<=[.!?]) +", r"\s"))
"""Where to cut, best first: between paragraphs, lines, sentences, words."""


def passages(text: str, size: int) -> Iterator[str]:
    """Yields pieces of `size` to `2 * size` characters whose concatenation is the text.

    Each ends at the best kind of break that lies in that range; the last takes what is left and
    may be shorter than `size`.
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
