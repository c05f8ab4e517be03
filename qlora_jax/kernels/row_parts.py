"""Splits products with very many rows, so that no offset in a kernel exceeds 32 bits.

The limits come from the source of jax 0.10.2, 0.11.2 and 0.12.0. Offsets count elements.

  * Pallas Triton (`_compute_offsets_from_indices`) computes offsets in 32 bits, and in 64 bits if
    an array has more than 2^32 bytes.
  * Mosaic GPU computes the start of a tile in 64 bits (`index`, in both of its copies and in
    `memref_ptr`), and offsets within the tile in 32 bits.
  * `mosaic/results.py` computes the whole offset in 32 signed bits for the forms "split" and
    "wgmma", so an array must have fewer than 2^31 elements.

`LIMIT` counts bytes, not elements. So an array of 16-bit values is split at half of the largest
correct size, and the padding of the features needs no extra check. A product of 2 GiB does not
become slower when it is split.
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
"""Upper bound in bytes (exclusive) for each operand and result of one kernel."""

TILE = max(
    *(tile.m for tiles in triton_tiles.TILES.values() for tile in tiles),
    *(tile.m for tiles in mosaic_tiles.TILES.values() for tile in tiles),
)
"""Rows of the tallest tile; the rows of every other tile divide this number."""


def split(rows: int, q: QTensor | QLayer, itemsize: int) -> tuple[int, int]:
    """Returns the number of parts of a product, and the rows of each part.

    Args:
      rows: rows of x, or of g in the backward pass.
      q: one matrix, or one layer of a stack.
      itemsize: bytes per value of x.

    Returns:
      Fewest parts whose operands and results are below `LIMIT`, and fewest rows per part, a
      multiple of `TILE`, that cover all rows. (A single tile is not split, even above `LIMIT`.)
    """
    most = (LIMIT - 1) // (max(q.shape[-2:]) * itemsize)
    most = max(TILE, most // TILE * TILE)
    count = max(1, -(-rows // most))
    return count, -(-rows // (count * TILE)) * TILE


def split_rows(product: Product) -> Product:
    """Returns a product that computes too many rows in equal parts, one after another.

    The last part ends with the last row, so it computes some rows of the part before it again. So
    all parts have one shape and use one compiled kernel. The result is written in place.
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
