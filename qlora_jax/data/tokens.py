"""Tokenized texts: ids, the characters that each id covers, and the answers' tokens."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.text.chat import Span
from qlora_jax.text.tokenizer import Tokenizer

WINDOW = 8
"""Number of tokens before an answer that are compared first, to avoid encoding the whole prompt."""


class Tokens(NamedTuple):
    """A tokenized text.

    Attributes:
      ids: token ids.
      offsets: i64[n, 2], start and end (exclusive) of each token, in characters.
    """

    ids: list[int]
    offsets: np.ndarray


def split_at_answers(
    text: str, starts: Sequence[int], tokens: Tokens, tokenizer: Tokenizer
) -> tuple[Tokens, int]:
    """Encodes a text in parts, cut where an answer's tokens would merge with its prompt.

    Generation encodes the prompt alone. Training on other tokens before the answer would differ
    from generation, so the text is cut at the start of each such answer.

    Returns:
      The tokens, and the number of answers that could not be separated from their prompt. This
      happens if the tokenizer puts a space in front of each part: the parts would then decode to
      another text, so the tokens are returned unchanged.
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
    """Returns whether the tokens before `start` equal those of `text[:start]` encoded alone."""
    low, high = tokens.offsets[:, 0], tokens.offsets[:, 1]
    if ((low < start) & (start < high)).any():
        return False
    count = int((high <= start).sum())
    first = max(0, count - WINDOW)
    near = tokenizer.encode(text[low[first] if first else 0 : start])
    return near == tokens.ids[first:count] or tokenizer.encode(text[:start]) == tokens.ids[:count]


def mark(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Returns a mask bool[n]: True for tokens that have a character in one of the spans.

    Byte-level tokenizers report an empty range for a token of spaces. The function treats such a
    token as the one character before its end.
    """
    start, end = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
    target = np.zeros(len(offsets), np.bool_)
    for low, high in spans:
        target |= (end > low) & (start < high) & (low < high)
    return target
