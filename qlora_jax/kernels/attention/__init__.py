"""Attention in which each query sees a range of keys: the one entry point."""

import functools

import jax

from qlora_jax.kernels.attention.select import module_of, pick
from qlora_jax.kernels.dense import saved_for_backward


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads, softmax in float32.

    No array of T x S exists, in the forward pass or in the backward one, which forms scores and
    softmax again. The result, and what the softmax is divided by, are marked as `saved_for_backward`. Products
    run in q's dtype, accumulated in float32.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, H_kv, D] with H a multiple of H_kv.
      first, last: int32[B, T], the first and the last key that a query sees; all between are seen.
      scale: factor on scores; None is D^-1/2.
      softcap: c in c·tanh(score/c), after scaling; None: scores as they are.
      implementation: "xla" runs on every device; "triton" keeps scores on the chip, on NVIDIA GPUs
        from sm_80 on. None picks by device, dtype and shapes, see `select.pick`.

    Returns:
      [B, T, H·D] in q's dtype, the heads side by side.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    implementation = implementation or pick(q.shape[1], q.shape[3], q.dtype)
    return _attend(implementation, scale, softcap, q, k, v, first, last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    implementation: str,
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> jax.Array:
    out, _ = module_of(implementation).forward(scale, softcap, q, k, v, first, last)
    return out.reshape(*out.shape[:2], -1)


def _forward(implementation, scale, softcap, q, k, v, first, last):
    out, normalizer = module_of(implementation).forward(scale, softcap, q, k, v, first, last)
    # named here, where they are residuals: so no policy has to compute all scores once more
    out, normalizer = (
        saved_for_backward(out.reshape(*out.shape[:2], -1)),
        saved_for_backward(normalizer),
    )
    return out, (q, k, v, first, last, out, normalizer)


def _backward(implementation, scale, softcap, saved, g):
    q, k, v, first, last, out, normalizer = saved
    out, g = out.reshape(q.shape), g.reshape(q.shape)
    dq, dk, dv = module_of(implementation).backward(
        scale, softcap, q, k, v, first, last, out, normalizer, g
    )
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)
