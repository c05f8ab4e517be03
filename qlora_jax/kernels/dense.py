"""The product x @ W for W in floats, with the dtype rule of `matmul` and gradients of x and W."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.quant.sharded import Sharded, whole

KEPT = "product"
"""Name of the values that `saved_for_backward` tags, for policies of `jax.checkpoint`."""

SLICES = 12
"""Largest number of slices of a 16-bit weight that `_one_row` sums in one expression. With 16, XLA
of jax 0.10 converts the weight to float32 outside the expression."""


@jax.custom_vjp
def dense(x: jax.Array, w: jax.Array | Sharded) -> jax.Array:
    """Returns x @ w.astype(x.dtype), accumulated in float32.

    The products of the backward pass also run in x's dtype. The gradient of w is accumulated in
    float32 and rounded once, to w's dtype. (JAX's own rule would multiply in float32.)

    Args:
      x: input, float [..., K].
      w: weight, float [K, N], in its storage dtype. A sharded weight is gathered in each pass, and
        only the shard is saved between the passes. Its gradient is this device's shard of the sum
        over all devices.

    Returns:
      Product, [..., N] in x's dtype.
    """
    return product(x, whole(w).astype(x.dtype), 0).astype(x.dtype)


def saved_for_backward(y: jax.Array) -> jax.Array:
    """Tags y so that the remat policy `dots` saves it instead of recomputing it."""
    return checkpoint_name(y, KEPT)


def product(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    """Contracts x's last axis with axis `contracted` of the matrix w; the result is float32."""
    if math.prod(x.shape[:-1]) == 1 and w.dtype == jnp.bfloat16:
        one_row = functools.partial(_one_row, contracted=contracted)
        default = functools.partial(_dot, contracted=contracted)
        return jax.lax.platform_dependent(x, w, cpu=one_row, default=default)
    return _dot(x, w, contracted)


def _dot(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    dimensions = (((x.ndim - 1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


def _one_row(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    """Computes `product` for a single row of x, without the float32 copy of w that XLA:CPU makes.

    One elementwise expression sums the slices of w along the contracted axis. A product with ones
    sums the values that remain.
    """
    # The barrier ties w to x. Otherwise XLA would convert w to float32 before an enclosing loop.
    x, w = jax.lax.optimization_barrier((x, w))
    part = _slice_length(w.shape[contracted])
    parts = range(w.shape[contracted] // part)
    wide = x.reshape(-1, part).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16)
    if contracted:
        slices = bits.reshape(w.shape[0], -1, part)
        terms = [_float32(slices[:, i]) * wide[i] for i in parts]
    else:
        slices = bits.reshape(-1, part, w.shape[1])
        terms = [_float32(slices[i]) * wide[i, :, None] for i in parts]
    total = functools.reduce(jnp.add, terms)
    return _dot(jnp.ones((*x.shape[:-1], part), jnp.float32), total, contracted)


def _float32(bits: jax.Array) -> jax.Array:
    """Returns the float32 values of bfloat16 numbers that are given as uint16.

    XLA:CPU vectorizes this better than its own conversion, which takes 1.5 times as long.
    """
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def _slice_length(features: int) -> int:
    """Returns the length of a slice, a divisor of `features`; if possible a multiple of 16."""
    least = -(-features // SLICES)
    parts = [p for p in range(least, features + 1) if features % p == 0]
    return next((p for p in parts if p % 16 == 0), features)


Weight = jax.Array | Sharded


def _forward(x: jax.Array, w: Weight) -> tuple[jax.Array, tuple[jax.Array, Weight]]:
    return dense(x, w), (x, w)


def _backward(saved: tuple[jax.Array, Weight], g: jax.Array) -> tuple[jax.Array, Weight]:
    x, held = saved
    w = whole(held)
    dx = product(g, w.astype(x.dtype), 1).astype(x.dtype)
    rows, columns = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dw = product(rows.T, columns, 0)
    if isinstance(held, Sharded):
        # dw stays in float32 until it is summed over all devices
        return dx, held.part_of(dw, w.dtype)
    return dx, dw.astype(w.dtype)


dense.defvjp(_forward, _backward)
