"""Tokenized texts: their ids, the characters of each, and the answers within them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.text.chat import Span
from qlora_jax.text.tokenizer import Tokenizer

WINDOW = 8
"""Tokens that are compared before an answer, in place of all."""


class Tokens(NamedTuple):
    """A tokenized text.

    Attributes:
      ids: the ids.
      offsets: i64[n, 2], the characters of each: start and end.
    """

    ids: list[int]
    offsets: np.ndarray


def parted(
    text: str, starts: Sequence[int], tokens: Tokens, tokenizer: Tokenizer
) -> tuple[Tokens, int]:
    """Encodes a text in parts where the tokens before an answer are not those of its prompt.

    In generation the prompt is encoded alone, so such a token could not be given.

    Returns:
      The tokens, and the number of answers that still begin within a token: a tokenizer that puts
      a space in front of each part would write another text.
    """
    cuts = [start for start in starts if not _is_parted(text, start, tokens, tokenizer)]
    if not cuts:
        return tokens, 0
    edges = [0, *cuts, len(text)]
    parts = tokenizer.encode_batch([text[a:b] for a, b in itertools.pairwise(edges)])
    ids = [id for own, _ in parts for id in own]
    if tokenizer.decode(ids, False) != tokenizer.decode(tokens.ids, False):
        return tokens, len(cuts)
    offsets = np.concatenate([own + edge for (_, own), edge in zip(parts, edges)])
    return Tokens(ids, offsets), 0


def _is_parted(text: str, start: int, tokens: Tokens, tokenizer: Tokenizer) -> bool:
    """Whether the tokens before a character are those of the text before it alone."""
    low, high = tokens.offsets[:, 0], tokens.offsets[:, 1]
    if ((low < start) & (start < high)).any():
        return False
    count = int((high <= start).sum())
    first = max(0, count - WINDOW)
    near = tokenizer.encode(text[low[first] if first else 0 : start])
    return near == tokens.ids[first:count] or tokenizer.encode(text[:start]) == tokens.ids[:count]


def mark(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """bool[n]: which tokens have a character in one of the spans.

    An empty token, which byte-level tokenizers report for spaces alone, stands for the character
    before its end.
    """
    start, end = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
    target = np.zeros(len(offsets), np.bool_)
    for low, high in spans:
        target |= (end > low) & (start < high) & (low < high)
    return target
