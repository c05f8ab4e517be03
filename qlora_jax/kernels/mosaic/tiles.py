"""The tiles of the Mosaic kernels, as data; this module can be imported with jax 0.10."""

import sys
from typing import NamedTuple

from jax.typing import DTypeLike

from qlora_jax.kernels.target import Capability
from qlora_jax.quant.qtensor import GROUP


class MosaicTile(NamedTuple):
    """The part of a product that one thread block computes, and its launch settings.

    Attributes:
      m: rows of the result.
      o: output features of the result.
      c: contraction indices per step.
      stages: steps in flight in the pipeline.
      form: form of the decoded operand, see `operand.Operand`.
      rows: most rows of x for which the tile is used.
      blocks: most thread blocks of a product whose contraction is split (split-K); 0 never splits.
    """

    m: int
    o: int
    c: int
    stages: int
    form: str = "mma"
    rows: int = sys.maxsize
    blocks: int = 0


_FEW = (
    MosaicTile(16, 64, 256, 3, "split", 16, 264),
    MosaicTile(32, 64, 64, 4, rows=32, blocks=264),
)
_ANY = (MosaicTile(64, 64, 64, 3),)

TILES = {
    (8, 0): (*_FEW, MosaicTile(64, 128, 64, 3, rows=1023), MosaicTile(128, 128, 64, 3), *_ANY),
    # on sm_86, 128 rows spill registers, and 64 rows keep the tensor cores busy
    (8, 6): (*_FEW, MosaicTile(64, 128, 64, 3), *_ANY),
    (9, 0): (
        *_FEW[:1],
        MosaicTile(64, 128, 128, 2, "wgmma", 128, 264),
        MosaicTile(64, 64, 64, 4, "wgmma", 128, 264),
        MosaicTile(256, 64, 64, 2, "wgmma", blocks=264),
    ),
    (10, 0): (*_FEW, MosaicTile(64, 128, 64, 3, rows=1023), MosaicTile(128, 128, 64, 3), *_ANY),
}
"""Compute capability to tiles, in order of preference. An entry holds for its capability and those
above, up to the next entry. With few rows a large tile would leave multiprocessors idle."""


def tile_for(m: int, inner: int, outer: int, capability: Capability) -> MosaicTile:
    """Returns the first tile that allows m rows and divides the features.

    Args:
      m: rows of x.
      inner: contraction features, a multiple of 64.
      outer: output features, a multiple of 64.
      capability: compute capability of the GPU, (8, 0) for sm_80.
    """
    tiles = TILES[max(c for c in TILES if c <= capability)]
    return next(t for t in tiles if m <= t.rows and inner % t.c == 0 and outer % t.o == 0)


def block(
    m: int, dtype: DTypeLike, inner: int, outer: int, direction: str, capability: Capability
) -> tuple[int, int]:
    """Returns the rows and columns of the result that one thread block computes.

    The arguments are described in `select.FusedProduct.tile`.
    """
    inner, outer = (-(-size // GROUP) * GROUP for size in (inner, outer))
    tile = tile_for(m, inner, outer, capability)
    return tile.m, tile.o


SPLITS = (1, 2, 4, 8)
SPLIT_STEPS = 8
"""Fewest steps per part of a split contraction, on average over the parts. The limit exists because
each block first fills its table."""


def split_count(tile: MosaicTile, m: int, inner: int, outer: int) -> int:
    """Returns the number of parts of the contraction; each part has its own thread block.

    The partial sums, in float32, take less memory than one byte per weight.

    Args:
      tile: tile that `tile_for` returns.
      m: rows of x.
      inner: contraction features.
      outer: output features.
    """
    tiles = -(-m // tile.m)
    most = min(
        tile.blocks // (tiles * (outer // tile.o)),
        inner // tile.c // SPLIT_STEPS,
        (inner - 1) // (4 * tiles * tile.m),
    )
    return max(s for s in SPLITS if s <= max(1, most))
