"""x @ W where W is an array: the same dtype rule as `matmul`, and a gradient for both."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.quant.sharded import Sharded, whole

KEPT = "product"
"""The name of what `saved_for_backward` marks, for policies of `jax.checkpoint`."""

SLICES = 12
"""Slices of a 16-bit weight that `_one_row` adds up in one expression, at most. With 16, XLA of jax
0.10 converts the weight to float32 outside of it."""


@jax.custom_vjp
def dense(x: jax.Array, w: jax.Array | Sharded) -> jax.Array:
    """x @ w.astype(x.dtype), accumulated in float32.

    The products of the backward pass also run in x's dtype; w's gradient is accumulated in
    float32 and rounded once, to w's dtype. (JAX's own rule would multiply in float32.)

    Args:
      x: float [..., K].
      w: float [K, N], in its storage dtype. One that is in parts is gathered in each pass, what is
        kept is the part, and its gradient is the part of what all devices add up to.

    Returns:
      [..., N] in x's dtype.
    """
    return product(x, whole(w).astype(x.dtype), 0).astype(x.dtype)


def saved_for_backward(y: jax.Array) -> jax.Array:
    """y, marked as a product that rather takes memory than is computed again."""
    return checkpoint_name(y, KEPT)


def product(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    """Contracts x's last axis with axis `contracted` of the matrix w; float32."""
    if math.prod(x.shape[:-1]) == 1 and w.dtype == jnp.bfloat16:
        one_row = functools.partial(_one_row, contracted=contracted)
        default = functools.partial(_dot, contracted=contracted)
        return jax.lax.platform_dependent(x, w, cpu=one_row, default=default)
    return _dot(x, w, contracted)


def _dot(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    dimensions = (((x.ndim - 1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


def _one_row(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    """The same for a single row of x, without a copy of w in float32, which XLA:CPU would make.

    One elementwise expression adds up slices of w along the contracted axis; the product with
    ones adds up the rest.
    """
    # Held to x, so that no loop around this converts w to float32 beforehand and keeps that.
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
    """The float32 values of bfloat16 numbers given as uint16.

    XLA:CPU vectorizes this better than its own conversion, which takes half as long again.
    """
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def _slice_length(features: int) -> int:
    """Returns how long a slice is: it divides `features`, and is a multiple of 16 if one does."""
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
        # in float32 until all devices' rows are in it
        return dx, held.part_of(dw, w.dtype)
    return dx, dw.astype(w.dtype)


dense.defvjp(_forward, _backward)
