"""Packs examples into rows of fixed length, and fills the arrays of a batch.

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
    """Groups whole examples into rows with the online best-fit algorithm.

    The function takes the examples in the given order and puts each into the open row where it
    leaves the least room. At most 128 rows are open. When there are more, the fullest row is
    closed, so the time is linear in the number of examples. Rows are at least 95% full if the
    average length is a quarter of the capacity or less.

    Args:
      lengths: number of positions that each example takes.
      capacity: number of positions in a row.
      order: order of the examples: each index into `lengths` once.

    Returns:
      The example indices of each row.
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
    """Returns the row lengths without packing: 1/8, 1/4, 1/2 and all of the capacity.

    There are only four lengths because XLA compiles one program for each.
    """
    return sorted({-(-capacity // share) for share in BUCKETS})


def fill(
    rows: Sequence[Sequence[int]],
    examples: Sequence[Example],
    length: int,
    count: int,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch of `count` rows; rows beyond `rows` hold only padding.

    Returns:
      tokens, targets, segments and positions i32[count, length], mask bool[count, length].
      `segments` is 0 on padding and 1, 2, ... for the examples of a row. `positions` restart at 0
      in each example. `mask` is true where `targets` carries loss. `tokens` and `targets` are
      `pad_id` on padding.
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
