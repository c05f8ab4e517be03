"""The entry point for attention in which each query sees a range of keys."""

import functools
from typing import Any

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
    """Returns scaled dot-product attention with grouped heads, with the softmax in float32.

        out = softmax(scale · q kᵀ) v

    No array of size T x S exists in either pass; the backward pass computes scores and softmax
    again. The result and the normalizer of the softmax are tagged with `saved_for_backward`.
    Products run in q's dtype and are accumulated in float32.

    Args:
      q: queries, [B, T, H, D].
      k: keys, [B, S, H_kv, D]; H is a multiple of H_kv.
      v: values, [B, S, H_kv, D].
      first: first key that each query sees, int32[B, T].
      last: last key that each query sees, int32[B, T]; a query sees all keys between the two.
      scale: factor on scores; None is D^-1/2.
      softcap: c in c·tanh(score/c), applied after scaling; None applies no cap.
      implementation: "xla" runs on every device; "triton" keeps scores in registers, on NVIDIA GPUs
        from sm_80 on. None picks by device, dtype and shapes, see `select.pick`.

    Returns:
      [B, T, H·D] in q's dtype, with the heads concatenated.
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


def _forward(
    implementation: str,
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, normalizer = module_of(implementation).forward(scale, softcap, q, k, v, first, last)
    # the tags must be on the residuals, so that a remat policy need not compute all scores again
    out, normalizer = (
        saved_for_backward(out.reshape(*out.shape[:2], -1)),
        saved_for_backward(normalizer),
    )
    return out, (q, k, v, first, last, out, normalizer)


def _backward(
    implementation: str,
    scale: float,
    softcap: float | None,
    saved: tuple[jax.Array, ...],
    g: jax.Array,
) -> tuple[Any, ...]:
    q, k, v, first, last, out, normalizer = saved
    out, g = out.reshape(q.shape), g.reshape(q.shape)
    dq, dk, dv = module_of(implementation).backward(
        scale, softcap, q, k, v, first, last, out, normalizer, g
    )
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)
