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


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention with grouped heads, softmax in float32.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, H_kv, D] with H a multiple of H_kv.
      mask: bool[B, 1, T, S]. A query that sees nothing (padding) gets an average of all.

    Returns:
      [B, T, H, D] in q's dtype.
    """
    b, t, h, d = q.shape
    groups = q.reshape(b, t, k.shape[2], h // k.shape[2], d)
    scores = jnp.einsum("btkgd,bskd->bkgts", groups, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores * d**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(b, t, h, d)
