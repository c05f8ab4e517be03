"""Which tile and which implementation each product uses, as data."""

import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

EVERY = sys.maxsize
"""More rows than there are."""


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
      form: how the decoded operand meets the tensor cores, of `operand.Operand`.
      rows: of x, for which it is taken at most.
      blocks: at most so many blocks share the contraction of a small result (split-K).
    """

    m: int
    o: int
    c: int
    stages: int
    form: str = "mma"
    rows: int = EVERY
    blocks: int = 0


_FEW = (
    MosaicTile(16, 64, 256, 3, "split", 16, 264),
    MosaicTile(32, 64, 64, 4, rows=32, blocks=264),
)
_ANY = (MosaicTile(64, 64, 64, 3),)

MOSAIC_TILES = {
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


def mosaic_tile(m: int, inner: int, outer: int, capability: tuple[int, int]) -> MosaicTile:
    """The first tile that is for m rows and divides the features.

    Args:
      m: rows.
      inner, outer: contraction and output features, multiples of 64.
      capability: of the GPU, (8, 0) for sm_80.
    """
    tiles = MOSAIC_TILES[max(c for c in MOSAIC_TILES if c <= capability)]
    return next(t for t in tiles if m <= t.rows and inner % t.c == 0 and outer % t.o == 0)


SPLITS = (1, 2, 4, 8)
SPLIT_STEPS = 8
"""Steps that a part of a contraction has at least; before the first a block fills its table."""


def mosaic_splits(tile: MosaicTile, m: int, inner: int, outer: int) -> int:
    """Into how many parts the contraction is divided, each for a block of its own.

    The parts of the sum, in float32, take less memory than a byte for each weight.

    Args:
      tile: of `mosaic_tile`.
      m, inner, outer: likewise.
    """
    tiles = -(-m // tile.m)
    most = min(
        tile.blocks // (tiles * (outer // tile.o)),
        inner // tile.c // SPLIT_STEPS,
        (inner - 1) // (4 * tiles * tile.m),
    )
    return max(s for s in SPLITS if s <= max(1, most))


FUSED_ROWS: Mapping[str, Mapping[tuple[int, int], tuple[range, ...]]] = {
    "mosaic": {
        (8, 0): (range(17), range(1024, EVERY)),
        (8, 6): (range(EVERY),),
        (9, 0): (range(512),),
        (10, 0): (range(17),),
    },
    "triton": {},
}
"""Implementation to compute capability (and those above, up to the next) to the rows of x for which
it is no slower than decoding first: as measured where docs/results/gpu has a report of such a GPU
(`gpu/measured.py`), else as modelled (docs/gpu.md). `python experiments/gpu_table.py --rows`
prints this table."""

CPU_ROWS_FUSED = 8
"""Rows of each half of a group in one expression, in a product with one row of x on a CPU; divides
32. With fewer, XLA of jax 0.10 leaves the loop scalar (7x slower); with more, compiling takes
longer and the product no less."""

CPU_TERMS = 12
"""Slices of a 16-bit weight that are added up in one expression, at most. With 16, XLA of jax 0.10
converts the weight to float32 outside of it."""


def cpu_part(features: int) -> int:
    """The length of a slice: a divisor of `features`, vectors of 16 where it can be."""
    least = -(-features // CPU_TERMS)
    parts = [p for p in range(least, features + 1) if features % p == 0]
    return next((p for p in parts if p % 16 == 0), features)
