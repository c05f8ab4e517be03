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


class MosaicTile(NamedTuple):
    """One block's share of a Mosaic kernel.

    Attributes:
      m: rows.
      o: output features.
      c: contraction indices of a step.
      stages: steps in flight.
    """

    m: int
    o: int
    c: int
    stages: int


MOSAIC_TILES = (
    MosaicTile(16, 64, 256, 3),
    MosaicTile(32, 64, 64, 4),
    MosaicTile(64, 128, 64, 3),
    MosaicTile(128, 128, 64, 3),
    MosaicTile(64, 64, 64, 3),
)
"""By preference among those of equal m."""


def mosaic_tile(m: int, inner: int, outer: int) -> MosaicTile:
    """The tile for m rows: the least that holds them, or else the largest, of those that divide.

    Args:
      m: rows.
      inner, outer: contraction and output features, multiples of 64.
    """
    fits = [t for t in MOSAIC_TILES if inner % t.c == 0 and outer % t.o == 0]
    return min((t for t in fits if t.m >= m), key=lambda t: t.m, default=max(fits))
