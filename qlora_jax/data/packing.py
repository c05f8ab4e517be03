"""Examples into rows of fixed length: which go together, and the arrays of a row.

An example of n ids takes n - 1 positions: at position i the model reads `ids[i]` and predicts
`ids[i + 1]`.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from qlora_jax.data.encode import Example

OPEN_ROWS = 128
BUCKETS = (8, 4, 2, 1)
DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "mask": np.bool_,
    "segments": np.int32,
    "positions": np.int32,
}


def pack(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Groups examples into rows without splitting any: best fit, online.

    Examples are taken in the given order; each goes into the open row where it leaves the least
    room. At most 128 rows are open and the fullest is closed first, so the time is linear. Rows
    come out at least 95% full when lengths average a quarter of the capacity or less.

    Args:
      lengths: positions each example takes.
      capacity: positions in a row.
      order: indices into lengths, each once.

    Returns:
      The indices in each row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"example {index} takes {length} positions, a row has {capacity}")
        fit = bisect_left(room, (length, -1))
        if fit < len(room):
            left, row = room.pop(fit)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - length, row))
        if len(room) > OPEN_ROWS:
            room.pop(0)
    return rows


def bucket_lengths(capacity: int) -> list[int]:
    """Row lengths used without packing: an eighth, a quarter, a half and all of the capacity.

    Each length is a program to compile, so there are few.
    """
    return sorted({-(-capacity // share) for share in BUCKETS})


def fill(
    rows: Sequence[Sequence[int]],
    examples: Sequence[Example],
    length: int,
    count: int,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """The arrays of `count` rows of `length` positions; those beyond `rows` are empty.

    Returns:
      tokens, targets, segments and positions i32[count, length], mask bool[count, length].
      segments are 0 on padding and 1, 2, ... in a row; positions restart at 0 in each; mask is
      true where `targets` carries loss. Tokens and targets are pad_id on padding.
    """
    out: dict[str, np.ndarray] = {
        name: np.zeros((count, length), dtype) for name, dtype in DTYPES.items()
    }
    out["tokens"][:] = out["targets"][:] = pad_id
    for r, row in enumerate(rows):
        at = 0
        for segment, index in enumerate(row, 1):
            ids, target = examples[index].ids, examples[index].target
            here = np.s_[r, at : at + len(ids) - 1]
            out["tokens"][here] = ids[:-1]
            out["targets"][here] = ids[1:]
            out["mask"][here] = target[1:]
            out["segments"][here] = segment
            out["positions"][here] = np.arange(len(ids) - 1)
            at += len(ids) - 1
    return out
