"""Decides from the stored tensors, not from the config, whether head and embedding are tied.

A config.json often contradicts the weights: fine-tuning tools write a separate head and
`tie_word_embeddings: true`, or leave out a head that was tied.
"""

import dataclasses
from collections.abc import Callable, Container
from typing import NamedTuple

import numpy as np

from qlora_jax.models.config import DecoderConfig

ROWS = 1024
"""Number of rows of the two matrices that are compared at a time."""

Rows = Callable[[int, int], np.ndarray]
"""Function of (start, stop) that reads the rows start to stop - 1 of a matrix."""


class Tie(NamedTuple):
    """The result of `resolve_tying`.

    Attributes:
      config: config, with `tie_embeddings` set from the stored tensors.
      stored: name of the tensor that holds the embedding.
      note: line for the user if the config was wrong; None if it was right.
    """

    config: DecoderConfig
    stored: str
    note: str | None


def resolve_tying(config: DecoderConfig, found: Container[str], equal: Callable[[], bool]) -> Tie:
    """Decides from the stored tensors whether embedding and head are tied.

    They are tied if only one of them is stored, or if both are stored and equal.

    Args:
      config: config as read from its file.
      found: names of the stored tensors.
      equal: function that returns whether the two matrices are equal; called only if both are
        stored.
    """
    embed, head = matrices(config)
    both = embed in found and head in found
    tied = not both or equal()
    note = None
    if tied != config.tie_embeddings:
        relation = f"{head} {'equals' if tied else 'differs from'} {embed}"
        absent = f"{head if embed in found else embed} is not stored"
        then = "one matrix is used for both" if tied else "each is used as it is stored"
        said = str(config.tie_embeddings).lower()
        note = f"tie_word_embeddings is {said}, but {relation if both else absent}: {then}"
    stored = embed if embed in found or head not in found else head
    return Tie(dataclasses.replace(config, tie_embeddings=tied), stored, note)


def matrices(config: DecoderConfig) -> tuple[str, str]:
    """Returns the tensor names of the embedding and the head."""
    return f"{config.names.embed}.weight", f"{config.names.head}.weight"


def equal_rows(count: int, first: Rows, second: Rows) -> bool:
    """Returns whether two matrices of `count` rows are equal; stops at the first difference."""
    starts = range(0, count, ROWS)
    blocks = ((first(i, min(i + ROWS, count)), second(i, min(i + ROWS, count))) for i in starts)
    return all(np.array_equal(a.astype(np.float32), b.astype(np.float32)) for a, b in blocks)
