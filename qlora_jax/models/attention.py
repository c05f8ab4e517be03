"""Which positions see which, and the attention over them."""

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


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention with grouped heads, softmax in float32.

    The backward pass forms scores and softmax again; they are never residuals. Its products run
    in q's dtype, accumulated in float32.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, H_kv, D] with H a multiple of H_kv.
      mask: bool[B, 1, T, S]. A query that sees nothing (padding) gets an average of all.

    Returns:
      [B, T, H, D] in q's dtype.
    """
    weights = _softmax(_grouped(q, k), k, mask).astype(q.dtype)
    return _einsum("bkgts,bskd->btkgd", weights, v).astype(q.dtype).reshape(q.shape)


def _forward(q, k, v, mask):
    return attend(q, k, v, mask), (q, k, v, mask)


def _backward(saved, g):
    q, k, v, mask = saved
    groups, g = _grouped(q, k), _grouped(g, k)
    weights = _softmax(groups, k, mask)
    slopes = _einsum("btkgd,bskd->bkgts", g, v)
    slopes -= jnp.sum(weights * slopes, axis=-1, keepdims=True)
    slopes = jnp.where(mask[:, :, None], weights * slopes * q.shape[-1] ** -0.5, 0).astype(q.dtype)
    dq = _einsum("bkgts,bskd->btkgd", slopes, k).reshape(q.shape)
    dk = _einsum("bkgts,btkgd->bskd", slopes, groups)
    dv = _einsum("bkgts,btkgd->bskd", weights.astype(q.dtype), g)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_forward, _backward)


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """[B, T, H, D] to [B, T, H_kv, H / H_kv, D]."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1])


def _softmax(groups: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    scores = _einsum("btkgd,bskd->bkgts", groups, k) * groups.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
