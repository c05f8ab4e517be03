"""Next-token cross-entropy as (sum, count), without the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp

from qlora_jax.kernels.dense import product

CHUNK = 128
"""Positions whose logits exist at one time."""

LIFT = 2.0**12
"""Factor on the logits' gradient, at most 1, while it is in the compute dtype: in float16 most
probabilities of a large vocabulary would be subnormal."""


def token_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    vocab_axis: int = 1,
    train_head: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy over the positions that carry loss, and their number.

    Positions are taken `CHUNK` at a time, those with loss first; a chunk without any is skipped.
    The gradient is formed in the forward pass, so logits are computed once.

    Args:
      hidden: [..., D] in the compute dtype.
      head: [D, vocab], or [vocab, D] with vocab_axis 0.
      targets: int32[...].
      mask: bool[...].
      vocab_axis: which axis of the head is the vocabulary.
      train_head: whether the head needs a gradient; without it, its gradient is zero.

    Returns:
      float32 sum and float32 count.
    """
    flat, mask = hidden.reshape(-1, hidden.shape[-1]), mask.reshape(-1)
    order = jnp.argsort(~mask, stable=True)
    # Rows without loss read as zeros, so that what is not finite there reaches no gradient.
    order = jnp.where(jnp.arange(len(order)) < mask.sum(), order, len(order))
    order = jnp.pad(order, (0, -len(order) % CHUNK), constant_values=len(order))

    def chunks(x: jax.Array) -> jax.Array:
        rows = x.at[order].get(mode="fill", fill_value=0)
        return rows.reshape(-1, CHUNK, *x.shape[1:])

    total = _total(
        vocab_axis, train_head, chunks(flat), head, chunks(targets.reshape(-1)), chunks(mask)
    )
    return total, mask.sum().astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    vocab_axis: int,
    train_head: bool,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    def chunk(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, t, m = xs
        loss = jax.lax.cond(
            m.any(), lambda: _cross_entropy(vocab_axis, h, head, t, m)[0], lambda: jnp.float32(0)
        )
        return total + loss, None

    return jax.lax.scan(chunk, jnp.float32(0), (hidden, targets, mask))[0]


def _forward(vocab_axis, train_head, hidden, head, targets, mask):
    def chunk(carry, xs):
        h, t, m = xs

        def compute(dhead):
            loss, dlogits = _cross_entropy(vocab_axis, h, head, t, m)
            dlogits = (dlogits * LIFT).astype(h.dtype)
            if train_head:
                rows, columns = (h, dlogits) if vocab_axis else (dlogits, h)
                dhead = dhead + product(rows.T, columns, 0) / LIFT
            dh = product(dlogits, head.astype(h.dtype), vocab_axis) / LIFT
            return loss, dh, dhead

        def skip(dhead):
            return jnp.float32(0), jnp.zeros(h.shape, jnp.float32), dhead

        total, dhead = carry
        loss, dh, dhead = jax.lax.cond(m.any(), compute, skip, dhead)
        return (total + loss, dhead), dh

    dhead = jnp.zeros(head.shape if train_head else (), jnp.float32)
    (total, dhead), dh = jax.lax.scan(chunk, (jnp.float32(0), dhead), (hidden, targets, mask))
    return total, (dh, dhead, hidden[:0], head[:0])


def _backward(vocab_axis, train_head, saved, g):
    dh, dhead, hidden, head = saved
    grad = (dhead * g).astype(head.dtype) if train_head else None
    return (dh * g).astype(hidden.dtype), grad, None, None


_total.defvjp(_forward, _backward)


def _cross_entropy(
    vocab_axis: int, h: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Summed loss of one chunk and its gradient with respect to the logits, float32."""
    logits = product(h, head.astype(h.dtype), 1 - vocab_axis)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = jnp.sum(jnp.where(mask[:, None], normalizer - picked, 0))
    hit = jnp.arange(logits.shape[-1]) == targets[:, None]
    return loss, (jnp.exp(logits - normalizer) - hit) * mask[:, None]
