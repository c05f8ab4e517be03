"""Decides whether a model's head is its embedding: the stored tensors tell, not the config.

A config.json often says otherwise than its file: fine-tuning tools write a head of its own beside
`tie_word_embeddings: true`, or leave out a head that was tied.
"""

import dataclasses
from collections.abc import Callable, Container
from typing import NamedTuple

import numpy as np

from qlora_jax.models.config import DecoderConfig

ROWS = 1024
"""Rows of the two matrices that are compared at one time."""

Rows = Callable[[int, int], np.ndarray]
"""Reads the rows of a matrix from the first index up to the second one."""


class Tie(NamedTuple):
    """The outcome of `settle`.

    Attributes:
      config: the config, its `tie_embeddings` as the tensors have it.
      stored: the name under which the embedding is stored.
      note: a line for the user where the config said otherwise; None where it agreed.
    """

    config: DecoderConfig
    stored: str
    note: str | None


def settle(config: DecoderConfig, found: Container[str], equal: Callable[[], bool]) -> Tie:
    """Returns what the stored tensors say of embedding and head.

    One of the two stored is both. Two equal ones are tied; two different ones are not.

    Args:
      config: the config as its file has it.
      found: the names of the stored tensors.
      equal: whether the two matrices are equal; called only if both are stored.
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
    """Returns the names of the embedding's and of the head's matrix."""
    return f"{config.names.embed}.weight", f"{config.names.head}.weight"


def equal_rows(count: int, first: Rows, second: Rows) -> bool:
    """Whether two matrices of `count` rows hold the same values; stops at the first difference."""
    starts = range(0, count, ROWS)
    blocks = ((first(i, min(i + ROWS, count)), second(i, min(i + ROWS, count))) for i in starts)
    return all(np.array_equal(a.astype(np.float32), b.astype(np.float32)) for a, b in blocks)
