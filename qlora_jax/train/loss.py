"""Next-token cross-entropy as (sum, count), without the logits of a batch or of a vocabulary."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.kernels.dense import product

ROWS = 256
"""Positions taken at a time."""

COLUMNS = 4096
"""Most tokens of the vocabulary whose logits exist at one time."""

LIFT = 2.0**12
"""Factor on exponentials, at most 1, while they are in the compute dtype: in float16 most
probabilities of a large vocabulary would be subnormal."""


class _Head(NamedTuple):
    """What is fixed about the head: `token_loss`'s arguments."""

    vocab_axis: int
    trained: bool
    softcap: float | None

    def logits(self, h: jax.Array, weight: jax.Array) -> jax.Array:
        """Of a block of the head's vectors, float32[R, block]."""
        logits = product(h, weight.astype(h.dtype), 1 - self.vocab_axis)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def sloped(self, values: jax.Array, logits: jax.Array) -> jax.Array:
        """values times the derivative of the cap where it gave these logits."""
        return values if self.softcap is None else values * (1 - (logits / self.softcap) ** 2)


class _Online(NamedTuple):
    """What has been seen of the vocabulary: per row, all float32."""

    highest: jax.Array
    """[R], the largest logit."""
    total: jax.Array
    """[R], the sum of exp(logit - highest)."""
    target: jax.Array
    """[R], the target's logit."""
    mean: jax.Array
    """[R, D], the sum of exp(logit - highest) times the slope of the cap times the head's
    vectors."""


def token_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    vocab_axis: int = 1,
    train_head: bool = False,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy over the positions that carry loss, and their number.

    Positions are taken `ROWS` at a time, those with loss first, and the vocabulary in blocks of
    `COLUMNS`; rows without any loss are skipped. The gradient is formed in the forward pass with
    an online softmax: d loss / d hidden is the mean of the head's vectors under the predicted
    distribution, less the target's, as attention over the vocabulary would compute it. The head's
    own gradient takes the logits a second time.

    Args:
      hidden: [..., D] in the compute dtype.
      head: [D, vocab], or [vocab, D] with vocab_axis 0.
      targets: int32[...].
      mask: bool[...].
      vocab_axis: which axis of the head is the vocabulary.
      train_head: whether the head needs a gradient; without it, its gradient is zero.
      softcap: c in logits of c·tanh(hidden @ head / c); None: as they are.

    Returns:
      float32 sum and float32 count.
    """
    flat, mask = hidden.reshape(-1, hidden.shape[-1]), mask.reshape(-1)
    rows = min(ROWS, len(mask))
    order = jnp.argsort(~mask, stable=True)
    # Rows without loss read as zeros, so that what is not finite there reaches no gradient.
    order = jnp.where(jnp.arange(len(order)) < mask.sum(), order, len(order))
    order = jnp.pad(order, (0, -len(order) % rows), constant_values=len(order))

    def chunks(x: jax.Array) -> jax.Array:
        taken = x.at[order].get(mode="fill", fill_value=0)
        return taken.reshape(-1, rows, *x.shape[1:])

    total = _total(
        _Head(vocab_axis, train_head, softcap),
        chunks(flat),
        head,
        chunks(targets.reshape(-1)),
        chunks(mask),
    )
    return total, mask.sum().astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    kind: _Head,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    def chunk(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        h, t, m = xs

        def compute() -> jax.Array:
            return _loss(_over_vocabulary(kind, h, head, t, with_mean=False), m)

        return total + jax.lax.cond(m.any(), compute, lambda: jnp.float32(0)), None

    return jax.lax.scan(chunk, jnp.float32(0), (hidden, targets, mask))[0]


def _forward(kind, hidden, head, targets, mask):
    def chunk(carry, xs):
        h, t, m = xs

        def compute(dhead):
            seen = _over_vocabulary(kind, h, head, t, with_mean=True)
            # rounded as the product before it rounded the other vectors
            of_target = jnp.take(head, t, axis=kind.vocab_axis, mode="clip").astype(h.dtype)
            of_target = of_target.T if kind.vocab_axis else of_target
            of_target = kind.sloped(of_target, seen.target[:, None])
            dh = (seen.mean / seen.total[:, None] - of_target) * m[:, None]
            if kind.trained:
                dhead = _add_head_gradient(kind, dhead, h, head, t, m, seen)
            return _loss(seen, m), dh, dhead

        def skip(dhead):
            return jnp.float32(0), jnp.zeros(h.shape, jnp.float32), dhead

        total, dhead = carry
        loss, dh, dhead = jax.lax.cond(m.any(), compute, skip, dhead)
        return (total + loss, dhead), dh

    dhead = jnp.zeros(head.shape if kind.trained else (), jnp.float32)
    (total, dhead), dh = jax.lax.scan(chunk, (jnp.float32(0), dhead), (hidden, targets, mask))
    return total, (dh, dhead, hidden[:0], head[:0])


def _backward(kind, saved, g):
    dh, dhead, hidden, head = saved
    grad = (dhead * g).astype(head.dtype) if kind.trained else None
    return (dh * g).astype(hidden.dtype), grad, None, None


_total.defvjp(_forward, _backward)


def _loss(seen: _Online, mask: jax.Array) -> jax.Array:
    normalizer = seen.highest + jnp.log(seen.total)
    return jnp.sum(jnp.where(mask, normalizer - seen.target, 0))


def _over_vocabulary(
    kind: _Head, h: jax.Array, head: jax.Array, targets: jax.Array, *, with_mean: bool
) -> _Online:
    """One pass over the head, block by block; `mean` stays zero unless it is asked for."""

    def block(i: jax.Array, seen: _Online) -> _Online:
        weight, ids, new = _block(kind.vocab_axis, head, i)
        whole = kind.logits(h, weight)
        logits = jnp.where(new, whole, -jnp.inf)
        highest = jnp.maximum(seen.highest, logits.max(axis=-1))
        powers = jnp.exp(logits - highest[:, None])
        shrink = jnp.exp(seen.highest - highest)
        hit = ids == targets[:, None]
        mean = seen.mean
        if with_mean:
            lifted = (kind.sloped(powers, whole) * LIFT).astype(h.dtype)
            mean *= shrink[:, None]
            mean += product(lifted, weight.astype(h.dtype), kind.vocab_axis) / LIFT
        return _Online(
            highest,
            seen.total * shrink + powers.sum(axis=-1),
            seen.target + jnp.where(hit & new, logits, 0).sum(axis=-1),
            mean,
        )

    rows = jnp.zeros(h.shape[0], jnp.float32)
    nothing = _Online(rows - jnp.inf, rows, rows, jnp.zeros(h.shape, jnp.float32))
    return jax.lax.fori_loop(0, _blocks(head.shape[kind.vocab_axis])[0], block, nothing)


def _add_head_gradient(
    kind: _Head,
    dhead: jax.Array,
    h: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    seen: _Online,
) -> jax.Array:
    normalizer = seen.highest + jnp.log(seen.total)

    def block(i: jax.Array, dhead: jax.Array) -> jax.Array:
        weight, ids, new = _block(kind.vocab_axis, head, i)
        logits = kind.logits(h, weight)
        hit = ids == targets[:, None]
        dlogits = (jnp.exp(logits - normalizer[:, None]) - hit) * (mask[:, None] & new)
        dlogits = (kind.sloped(dlogits, logits) * LIFT).astype(h.dtype)
        rows, columns = (h, dlogits) if kind.vocab_axis else (dlogits, h)
        part = product(rows.T, columns, 0) / LIFT
        old = jax.lax.dynamic_slice_in_dim(dhead, ids[0], len(ids), kind.vocab_axis)
        return jax.lax.dynamic_update_slice_in_dim(dhead, old + part, ids[0], kind.vocab_axis)

    return jax.lax.fori_loop(0, _blocks(head.shape[kind.vocab_axis])[0], block, dhead)


def _blocks(vocabulary: int) -> tuple[int, int]:
    """Number and size of the blocks; the last may reach back into the one before it."""
    blocks = -(-vocabulary // COLUMNS)
    # whole vectors of a CPU and tiles of a GPU
    return blocks, min(vocabulary, -(-vocabulary // (blocks * 128)) * 128)


def _block(
    vocab_axis: int, head: jax.Array, i: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block i of the head, the tokens in it, and which of them no block before it held."""
    vocabulary = head.shape[vocab_axis]
    _, size = _blocks(vocabulary)
    start = jnp.minimum(i * size, vocabulary - size)
    ids = start + jnp.arange(size)
    # Held to the block: XLA:CPU would convert the whole head before the loop, and keep that.
    head, start = jax.lax.optimization_barrier((head, start))
    weight = jax.lax.dynamic_slice_in_dim(head, start, size, vocab_axis)
    return weight, ids, ids >= i * size
