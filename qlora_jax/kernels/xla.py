"""The reference implementation: decodes the weight, then multiplies; runs on every backend."""

import functools
import math

import jax
import jax.numpy as jnp

from qlora_jax.kernels.dense import product
from qlora_jax.quant import QTensor, dequantize
from qlora_jax.quant.qtensor import GROUP, block_scales, group_scales, selected

HALF = GROUP // 2
ROWS_FUSED = 8
"""Rows of each half of a group that `_one_row` sums in one expression on a CPU; divides HALF.
With fewer rows, XLA of jax 0.10 slices the stack of layers inside the loop, and the loop is not
vectorized (7x slower). With more rows, compilation is slower and the product is not faster."""


def forward(x: jax.Array, q: QTensor) -> jax.Array:
    """Returns x @ W, [..., K] to [..., N] in x's dtype, accumulated in float32."""
    if math.prod(x.shape[:-1]) == 1:
        return jax.lax.platform_dependent(x, q, cpu=_one_row, default=_decoded)
    return _decoded(x, q)


def backward(g: jax.Array, q: QTensor) -> jax.Array:
    """Returns g @ W.T, [..., N] to [..., K] in g's dtype, accumulated in float32."""
    return product(g, dequantize(q, g.dtype), 1).astype(g.dtype)


def _decoded(x: jax.Array, q: QTensor) -> jax.Array:
    return product(x, dequantize(q, x.dtype), 0).astype(x.dtype)


def _one_row(x: jax.Array, q: QTensor) -> jax.Array:
    """Returns x @ W for a single row of x; the decoded weight is neither stored nor rounded.

    One elementwise expression over [group, row, n] sums `ROWS_FUSED` rows of each half and
    multiplies the sum by the scale. XLA:CPU vectorizes it along n and divides it among threads. The
    remaining sum is written as a product with ones, because XLA would fuse a plain sum into the
    expression and then not vectorize it. A byte is widened once for both of its codes; the bits are
    tested in place.
    """
    n = q.codes.shape[-1]
    flat = jnp.pad(x.reshape(-1), (0, 2 * q.codes.shape[0] - q.in_features)).astype(jnp.float32)
    rows = flat.reshape(-1, 2, ROWS_FUSED, HALF // ROWS_FUSED, 1)
    pairs = q.codes.reshape(-1, ROWS_FUSED, HALF // ROWS_FUSED, n)
    scales = group_scales(block_scales(q), q)
    halves = []
    for half in range(2):
        terms = [
            selected(pairs[:, i].astype(jnp.int32), q.codebook, 4 * half) * rows[:, half, i]
            for i in range(ROWS_FUSED)
        ]
        halves.append(functools.reduce(jnp.add, terms) * scales[:, half % scales.shape[1]])
    total = (halves[0] + halves[1]).reshape(-1, n)
    y = product(jnp.ones((1, total.shape[0]), jnp.float32), total, 0)
    return y.astype(x.dtype).reshape(*x.shape[:-1], n)
