"""Products with very many rows, done in parts, so that no kernel's offsets outgrow 32 bits.

What was read in jax 0.10.2, 0.11.2 and 0.12.0. Offsets count elements. Pallas Triton
(`_compute_offsets_from_indices`) computes them in 32 bits, and in 64 where an array has more than
2^32 bytes. Mosaic GPU computes the start of a tile in 64 bits (`index`, in both of its copies and
in `memref_ptr`) and places within the tile in 32. `mosaic/results.py`, for the forms "split" and
"wgmma", computes the whole offset in 32 signed bits: 2^31 elements are too many for it. The bound
here counts bytes: an array of 16 bits is divided at half of what would still be right, and padding
of the features needs no reckoning. A product of 2 GiB loses nothing by it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qlora_jax.kernels import triton_tiles
from qlora_jax.kernels.mosaic import tiles as mosaic_tiles
from qlora_jax.quant.qtensor import QTensor
from qlora_jax.quant.stack import QLayer

Product = Callable[[jax.Array, QTensor | QLayer], jax.Array]

LIMIT = 2**31
"""Bytes that an operand or a result of one kernel stays below."""

TILE = max(
    *(tile.m for tiles in triton_tiles.TILES.values() for tile in tiles),
    *(tile.m for tiles in mosaic_tiles.TILES.values() for tile in tiles),
)
"""Rows of the tallest tile; those of all others divide it."""


def split(rows: int, q: QTensor | QLayer, itemsize: int) -> tuple[int, int]:
    """Returns the number of parts that a product is done in, and the rows of each.

    Args:
      rows: of x, or of g in the backward pass.
      q: one matrix, or a stack of which one is meant.
      itemsize: bytes of x's dtype.

    Returns:
      The fewest parts whose operands and results are below `LIMIT`, and for these the fewest rows,
      a multiple of `TILE`, that cover all. (One tile is not divided, even where it does not fit.)
    """
    most = (LIMIT - 1) // (max(q.shape[-2:]) * itemsize)
    most = max(TILE, most // TILE * TILE)
    count = max(1, -(-rows // most))
    return count, -(-rows // (count * TILE)) * TILE


def divided(product: Product) -> Product:
    """The same product; where it does not fit, in equal parts along the rows, one after another.

    The last part ends with the last row, so it computes some rows of the one before once more:
    all parts are one compiled kernel, and the result is written in place.
    """

    def whole_or_parts(x: jax.Array, q: QTensor | QLayer) -> jax.Array:
        lead = x.shape[:-1]
        count, each = split(math.prod(lead), q, x.dtype.itemsize)
        if count == 1:
            return product(x, q)
        rows = x.reshape(-1, x.shape[-1])

        def part(i: jax.Array, total: jax.Array) -> jax.Array:
            start = jnp.minimum(i * each, rows.shape[0] - each)
            taken = jax.lax.dynamic_slice_in_dim(rows, start, each)
            return jax.lax.dynamic_update_slice_in_dim(total, product(taken, q), start, 0)

        result = jax.eval_shape(product, rows, q)
        total = jax.lax.fori_loop(0, count, part, jnp.zeros(result.shape, result.dtype))
        return total.reshape(*lead, -1)

    return whole_or_parts
