"""Which tile each kernel uses, as data."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike


class Tile(NamedTuple):
    """One program's share of a kernel.

    Attributes:
      m: rows of x; 16 is the least that tensor cores take.
      n: columns of W.
      warps: of 32 threads.
      stages: of the compiler's software pipeline.
    """

    m: int
    n: int
    warps: int = 4
    stages: int = 2


TRITON_TILES = {
    2: (Tile(16, 32), Tile(32, 64), Tile(64, 64)),
    4: (Tile(16, 32),),
}
"""Bytes of x's dtype to tiles by m. Larger ones spill registers on an sm_80."""


def triton_tile(m: int, dtype: DTypeLike) -> Tile:
    """The smallest tile that holds m rows, or the largest there is."""
    tiles = TRITON_TILES[jnp.dtype(dtype).itemsize]
    return next((tile for tile in tiles if m <= tile.m), tiles[-1])
