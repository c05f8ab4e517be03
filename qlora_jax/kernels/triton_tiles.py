"""The tiles of the Triton kernels, as data."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from qlora_jax.kernels.target import Capability
from qlora_jax.quant.qtensor import GROUP


class TritonTile(NamedTuple):
    """The part of a product that one program computes, and its launch settings.

    Attributes:
      m: rows of x; tensor cores need at least 16.
      n: columns of W.
      warps: number of warps, of 32 threads each.
      stages: depth of the compiler's software pipeline.
    """

    m: int
    n: int
    warps: int = 4
    stages: int = 2


TILES = {
    2: (TritonTile(16, 32), TritonTile(32, 64), TritonTile(64, 64)),
    4: (TritonTile(16, 32),),
}
"""Bytes of x's dtype to tiles, ordered by m. Larger tiles spill registers on sm_80."""


def tile_for(m: int, dtype: DTypeLike) -> TritonTile:
    """Returns the smallest tile that holds m rows, or the largest tile if none does."""
    tiles = TILES[jnp.dtype(dtype).itemsize]
    return next((tile for tile in tiles if m <= tile.m), tiles[-1])


def block(
    m: int, dtype: DTypeLike, inner: int, outer: int, direction: str, capability: Capability
) -> tuple[int, int]:
    """Returns the rows and columns of the result that one program computes.

    The arguments are described in `select.FusedProduct.tile`.
    """
    tile = tile_for(m, dtype)
    return tile.m, tile.n if direction == "forward" else GROUP
