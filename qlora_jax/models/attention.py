"""Which positions see which, and the attention over them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def visible(
    q_segments: jax.Array,
    k_segments: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    window: jax.Array | None,
) -> jax.Array:
    """Causal visibility within a segment, and within the window where there is one.

    Args:
      q_segments, q_positions: int32[B, T].
      k_segments, k_positions: int32[B, S].
      window: int32[], how many positions back a query sees, itself included; None: all.

    Returns:
      bool[B, 1, T, S].
    """
    back = q_positions[:, :, None] - k_positions[:, None, :]
    mask = (back >= 0) & (q_segments[:, :, None] == k_segments[:, None, :])
    if window is not None:
        mask &= back < window
    return mask[:, None]


ROWS = 256
"""Queries whose scores exist at one time."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads, softmax in float32.

    Queries are taken `ROWS` at a time, so that scores of T x S are never held. The backward pass
    forms scores and softmax again; they are never residuals. Its products run in q's dtype,
    accumulated in float32.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, H_kv, D] with H a multiple of H_kv.
      mask: bool[B, 1, T, S]. A query that sees nothing (padding) gets an average of all.
      scale: factor on scores; None is D^-1/2.
      softcap: c in c·tanh(score/c), after scaling; None: scores as they are.

    Returns:
      [B, T, H, D] in q's dtype.
    """
    return _attend(q.shape[-1] ** -0.5 if scale is None else scale, softcap, q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    def rows(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        q, mask = xs
        scores = _scores(scale, softcap, _grouped(q, k), k)
        weights = _softmax(scores, mask).astype(q.dtype)
        return None, _einsum("bkgts,bskd->btkgd", weights, v).astype(q.dtype).reshape(q.shape)

    return _over_rows(rows, None, (q, 1), (mask, 2))[1]


def _forward(scale, softcap, q, k, v, mask):
    return _attend(scale, softcap, q, k, v, mask), (q, k, v, mask)


def _backward(scale, softcap, saved, g):
    q, k, v, mask = saved

    def rows(carry, xs):
        dk, dv = carry
        q, g, mask = xs
        groups, g = _grouped(q, k), _grouped(g, k)
        scores = _scores(scale, softcap, groups, k)
        weights = _softmax(scores, mask)
        slopes = _einsum("btkgd,bskd->bkgts", g, v)
        slopes -= jnp.sum(weights * slopes, axis=-1, keepdims=True)
        slopes = jnp.where(mask[:, :, None], weights * slopes * scale, 0)
        if softcap is not None:
            slopes *= 1 - (scores / softcap) ** 2
        slopes = slopes.astype(q.dtype)
        dq = _einsum("bkgts,bskd->btkgd", slopes, k).reshape(q.shape).astype(q.dtype)
        dk += _einsum("bkgts,btkgd->bskd", slopes, groups)
        dv += _einsum("bkgts,btkgd->bskd", weights.astype(q.dtype), g)
        return (dk, dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = _over_rows(rows, zeros, (q, 1), (g, 1), (mask, 2))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _over_rows(
    step: Callable[[Any, tuple[jax.Array, ...]], tuple[Any, jax.Array]],
    carry: Any,
    *arrays: tuple[jax.Array, int],
) -> tuple[Any, jax.Array]:
    """Scans over `ROWS` queries at a time.

    Args:
      step: (carry, chunks) to (carry, rows [B, `ROWS`, ...] of the result).
      carry: what the first step begins with.
      arrays: each with its axis of queries.

    Returns:
      The last carry, and the result [B, T, ...].
    """
    length = arrays[0][0].shape[arrays[0][1]]
    if length <= ROWS:
        return step(carry, tuple(x for x, _ in arrays))
    chunks = -(-length // ROWS)

    def padded(x: jax.Array, axis: int) -> jax.Array:
        pad = [(0, chunks * ROWS - length) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.pad(x, pad)

    wide = [(padded(x, axis), axis) for x, axis in arrays]

    def chunk(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        return step(
            carry,
            tuple(jax.lax.dynamic_slice_in_dim(x, i * ROWS, ROWS, axis) for x, axis in wide),
        )

    carry, made = jax.lax.scan(chunk, carry, jnp.arange(chunks))
    made = made.swapaxes(0, 1)
    return carry, made.reshape(made.shape[0], -1, *made.shape[3:])[:, :length]


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """[B, T, H, D] to [B, T, H_kv, H / H_kv, D]."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1])


def _scores(scale: float, softcap: float | None, groups: jax.Array, k: jax.Array) -> jax.Array:
    scores = _einsum("btkgd,bskd->bkgts", groups, k) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
