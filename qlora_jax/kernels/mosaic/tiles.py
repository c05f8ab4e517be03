"""The tiles of the Mosaic kernels, as data; jax 0.10 can import this module."""

import sys
from typing import NamedTuple

from jax.typing import DTypeLike

from qlora_jax.kernels.target import Capability
from qlora_jax.quant.qtensor import GROUP


class MosaicTile(NamedTuple):
    """One block's share of a kernel.

    Attributes:
      m: rows.
      o: output features.
      c: contraction indices of a step.
      stages: steps in flight.
      form: the way the decoded operand reaches the tensor cores; see `operand.Operand`.
      rows: the most rows of x that it is taken for.
      blocks: the most blocks that share the contraction of a small result (split-K).
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
    # 128 rows spill here, and their tensor cores are busy with 64
    (8, 6): (*_FEW, MosaicTile(64, 128, 64, 3), *_ANY),
    (9, 0): (
        *_FEW[:1],
        MosaicTile(64, 128, 128, 2, "wgmma", 128, 264),
        MosaicTile(64, 64, 64, 4, "wgmma", 128, 264),
        MosaicTile(256, 64, 64, 2, "wgmma", blocks=264),
    ),
    (10, 0): (*_FEW, MosaicTile(64, 128, 64, 3, rows=1023), MosaicTile(128, 128, 64, 3), *_ANY),
}
"""Compute capability (and those above, up to the next) to tiles, by preference. With fewer rows a
large tile would leave multiprocessors idle."""


def tile_for(m: int, inner: int, outer: int, capability: Capability) -> MosaicTile:
    """Returns the first tile that is for m rows and divides the features.

    Args:
      m: rows.
      inner, outer: contraction and output features, multiples of 64.
      capability: the GPU's compute capability, (8, 0) for sm_80.
    """
    tiles = TILES[max(c for c in TILES if c <= capability)]
    return next(t for t in tiles if m <= t.rows and inner % t.c == 0 and outer % t.o == 0)


def block(
    m: int, dtype: DTypeLike, inner: int, outer: int, direction: str, capability: Capability
) -> tuple[int, int]:
    """Returns the rows and columns of the result that one block computes; see `select.FusedProduct`."""
    inner, outer = (-(-size // GROUP) * GROUP for size in (inner, outer))
    tile = tile_for(m, inner, outer, capability)
    return tile.m, tile.o


SPLITS = (1, 2, 4, 8)
SPLIT_STEPS = 8
"""Steps that a part of a contraction has at least; before the first a block fills its table."""


def split_count(tile: MosaicTile, m: int, inner: int, outer: int) -> int:
    """Returns into how many parts the contraction is divided, each for a block of its own.

    The parts of the sum, in float32, take less memory than a byte for each weight.

    Args:
      tile: the tile that `tile_for` returns.
      m, inner, outer: likewise.
    """
    tiles = -(-m // tile.m)
    most = min(
        tile.blocks // (tiles * (outer // tile.o)),
        inner // tile.c // SPLIT_STEPS,
        (inner - 1) // (4 * tiles * tile.m),
    )
    return max(s for s in SPLITS if s <= max(1, most))
