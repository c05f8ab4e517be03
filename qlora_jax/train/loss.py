"""Next-token cross-entropy as (sum, count), without the logits of a batch or of a vocabulary."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.kernels.dense import product
from qlora_jax.quant.sharded import Sharded, looked_up, whole
from qlora_jax.runtime import mesh

ROWS = 256
"""Positions taken at a time."""

ROWS_OF_PARTS = 2048
"""Positions taken at a time with a head in parts, which is gathered anew for the next ones."""

COLUMNS = 4096
"""Most tokens of the vocabulary whose logits exist at one time."""

LIFT = 2.0**12
"""Factor on exponentials, at most 1, while they are in the compute dtype: in float16 most
probabilities of a large vocabulary would be subnormal."""


Arrays = tuple[jax.Array, ...]
"""One array for each matrix of a head."""

Matrices = tuple[jax.Array | Sharded, ...]
"""The matrices of a head; one in parts has all of the vocabulary, and part of each vector."""


class _Head(NamedTuple):
    """What is fixed about a head whose logits are the sum of h @ weight over its matrices.

    Attributes:
      vocab_axes: which axis of each matrix is the vocabulary.
      trained: which matrices need a gradient.
      softcap: as `token_loss` takes it.
    """

    vocab_axes: tuple[int, ...]
    trained: tuple[bool, ...]
    softcap: float | None

    def logits(self, h: Arrays, weights: Arrays) -> jax.Array:
        """Of a block of the vocabulary's vectors in each matrix, float32[R, block]."""
        parts = zip(h, weights, self.vocab_axes)
        products = [product(x, weight.astype(x.dtype), 1 - axis) for x, weight, axis in parts]
        logits = functools.reduce(jnp.add, products)
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
    mean: Arrays
    """[R, D] for each matrix of the head, the sum of exp(logit - highest) times the slope of the
    cap times the vocabulary's vectors in it."""


def token_loss(
    hidden: jax.Array,
    head: jax.Array | Sharded,
    targets: jax.Array,
    mask: jax.Array,
    *,
    vocab_axis: int = 1,
    train_head: bool = False,
    softcap: float | None = None,
    update: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy over the positions that carry loss, and their number.

    Positions are taken `ROWS` at a time, those with loss first, and the vocabulary in blocks of
    `COLUMNS`; rows without any loss are skipped. The gradient is formed in the forward pass with
    an online softmax: d loss / d hidden is the mean of the head's vectors under the predicted
    distribution, less the target's, as attention over the vocabulary would compute it. The
    gradient of the head, or of the matrix b of an update, takes the logits a second time.

    A head in parts is gathered a block of the vocabulary at a time, for `ROWS_OF_PARTS` positions,
    which are skipped where no device has loss in its own.

    Args:
      hidden: [..., D] in the compute dtype.
      head: [D, vocab], or [vocab, D] with vocab_axis 0; inside `jax.shard_map` maybe in parts.
      targets: int32[...].
      mask: bool[...].
      vocab_axis: which axis of the head is the vocabulary.
      train_head: whether the head needs a gradient; without it, its gradient is zero.
      softcap: c in logits of c·tanh(x / c); None: as they are.
      update: low [..., r] in the compute dtype and b [r, vocab], of which low @ b is added to
        hidden @ head; both get gradients.

    Returns:
      float32 sum and float32 count.
    """
    # each product that the logits are a sum of: input, matrix, vocabulary's axis, trained or not
    products = [(hidden, head, vocab_axis, train_head)]
    if update is not None:
        products.append((*update, 1, True))
    inputs, matrices, axes, trained = zip(*products)
    mask = mask.reshape(-1)
    split = isinstance(head, Sharded)
    rows = min(ROWS_OF_PARTS if split else ROWS, len(mask))
    order = jnp.argsort(~mask, stable=True)
    # Rows without loss read as zeros, so that what is not finite there reaches no gradient.
    order = jnp.where(jnp.arange(len(order)) < mask.sum(), order, len(order))
    order = jnp.pad(order, (0, -len(order) % rows), constant_values=len(order))

    def chunks(x: jax.Array) -> jax.Array:
        taken = x.at[order].get(mode="fill", fill_value=0)
        return taken.reshape(-1, rows, *x.shape[1:])

    carrying = chunks(mask)
    busy = carrying.any(axis=-1)
    if split:  # devices gather together, or none does
        busy = jax.lax.pmax(busy.astype(jnp.int32), mesh.ROWS) > 0
    total = _total(
        _Head(axes, trained, softcap),
        tuple(chunks(x.reshape(-1, x.shape[-1])) for x in inputs),
        matrices,
        chunks(targets.reshape(-1)),
        carrying,
        busy,
    )
    return total, mask.sum().astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    kind: _Head,
    hidden: Arrays,
    head: Matrices,
    targets: jax.Array,
    mask: jax.Array,
    busy: jax.Array,
) -> jax.Array:
    def chunk(total: jax.Array, xs: tuple[Any, ...]) -> tuple[jax.Array, None]:
        h, t, m, computes = xs

        def compute() -> jax.Array:
            return _loss(_over_vocabulary(kind, h, head, t, with_mean=False), m)

        return total + jax.lax.cond(computes, compute, lambda: jnp.float32(0)), None

    return jax.lax.scan(chunk, jnp.float32(0), (hidden, targets, mask, busy))[0]


def _forward(kind, hidden, head, targets, mask, busy):
    def chunk(carry, xs):
        h, t, m, computes = xs

        def compute(dhead):
            seen = _over_vocabulary(kind, h, head, t, with_mean=True)
            dh = tuple(
                _input_gradient(kind, seen, mean, weight, axis, t, m, x.dtype)
                for mean, weight, axis, x in zip(seen.mean, head, kind.vocab_axes, h)
            )
            if any(kind.trained):
                dhead = _add_head_gradient(kind, dhead, h, head, t, m, seen)
            return _loss(seen, m), dh, dhead

        def skip(dhead):
            return jnp.float32(0), tuple(jnp.zeros(x.shape, jnp.float32) for x in h), dhead

        total, dhead = carry
        loss, dh, dhead = jax.lax.cond(computes, compute, skip, dhead)
        return (total + loss, dhead), dh

    dhead = tuple(
        jnp.zeros(_held(weight).shape if trained else (), jnp.float32)
        for weight, trained in zip(head, kind.trained)
    )
    xs = hidden, targets, mask, busy
    (total, dhead), dh = jax.lax.scan(chunk, (jnp.float32(0), dhead), xs)
    nothing = jax.tree.map(lambda x: x[:0], (hidden, head))
    return total, (dh, dhead, *nothing)


def _input_gradient(kind, seen, mean, weight, vocab_axis, targets, mask, dtype):
    """Gradient with respect to what one matrix of the head is multiplied by, float32[R, D]."""
    # rounded as the product before it rounded the other vectors
    if isinstance(weight, Sharded):
        of_target = looked_up(weight, targets, vocab_axis).astype(dtype)
    else:
        of_target = jnp.take(weight, targets, axis=vocab_axis, mode="clip").astype(dtype)
        of_target = of_target.T if vocab_axis else of_target
    of_target = kind.sloped(of_target, seen.target[:, None])
    return (mean / seen.total[:, None] - of_target) * mask[:, None]


def _backward(kind, saved, g):
    dh, dhead, hidden, head = saved
    dhidden = tuple((slope * g).astype(x.dtype) for slope, x in zip(dh, hidden))
    grads = tuple(
        _like(weight, (slope * g).astype(_held(weight).dtype)) if trained else None
        for slope, weight, trained in zip(dhead, head, kind.trained)
    )
    return dhidden, grads, None, None, None


_total.defvjp(_forward, _backward)


def _held(weight: jax.Array | Sharded) -> Any:
    """Returns what this device has of a matrix."""
    return weight.part if isinstance(weight, Sharded) else weight


def _like(weight: jax.Array | Sharded, held: jax.Array) -> jax.Array | Sharded:
    """Returns an array as a matrix in the parts that another is in."""
    return Sharded(held, weight.axes) if isinstance(weight, Sharded) else held


def _loss(seen: _Online, mask: jax.Array) -> jax.Array:
    normalizer = seen.highest + jnp.log(seen.total)
    return jnp.sum(jnp.where(mask, normalizer - seen.target, 0))


def _over_vocabulary(
    kind: _Head, h: Arrays, head: Matrices, targets: jax.Array, *, with_mean: bool
) -> _Online:
    """One pass over the head, block by block; `mean` stays zero unless it is asked for."""

    def block(i: jax.Array, seen: _Online) -> _Online:
        weights, ids, new = _block(kind.vocab_axes, head, i)
        every = kind.logits(h, weights)
        logits = jnp.where(new, every, -jnp.inf)
        highest = jnp.maximum(seen.highest, logits.max(axis=-1))
        powers = jnp.exp(logits - highest[:, None])
        shrink = jnp.exp(seen.highest - highest)
        hit = ids == targets[:, None]
        mean = seen.mean
        if with_mean:
            lifted = (kind.sloped(powers, every) * LIFT).astype(h[0].dtype)
            mean = tuple(
                old * shrink[:, None] + product(lifted, weight.astype(lifted.dtype), axis) / LIFT
                for old, weight, axis in zip(mean, weights, kind.vocab_axes)
            )
        return _Online(
            highest,
            seen.total * shrink + powers.sum(axis=-1),
            seen.target + jnp.where(hit & new, logits, 0).sum(axis=-1),
            mean,
        )

    rows = jnp.zeros(len(targets), jnp.float32)
    means = tuple(jnp.zeros(x.shape, jnp.float32) for x in h)
    nothing = _Online(rows - jnp.inf, rows, rows, means)
    return jax.lax.fori_loop(0, _blocks(_vocabulary(kind.vocab_axes, head))[0], block, nothing)


def _add_head_gradient(
    kind: _Head,
    dhead: Arrays,
    h: Arrays,
    head: Matrices,
    targets: jax.Array,
    mask: jax.Array,
    seen: _Online,
) -> Arrays:
    """The gradients of the trained matrices with those of R rows added; the others as they are."""
    normalizer = seen.highest + jnp.log(seen.total)

    def block(i: jax.Array, dhead: Arrays) -> Arrays:
        weights, ids, new = _block(kind.vocab_axes, head, i)
        logits = kind.logits(h, weights)
        hit = ids == targets[:, None]
        dlogits = (jnp.exp(logits - normalizer[:, None]) - hit) * (mask[:, None] & new)
        dlogits = (kind.sloped(dlogits, logits) * LIFT).astype(h[0].dtype)

        def added(all: jax.Array, x: jax.Array, axis: int, weight: Any) -> jax.Array:
            rows, columns = (x, dlogits) if axis else (dlogits, x)
            part = product(rows.T, columns, 0) / LIFT
            if isinstance(weight, Sharded):
                part = _held(weight.part_of(part, part.dtype))
            old = jax.lax.dynamic_slice_in_dim(all, ids[0], len(ids), axis)
            return jax.lax.dynamic_update_slice_in_dim(all, old + part, ids[0], axis)

        parts = zip(dhead, h, kind.vocab_axes, head, kind.trained)
        return tuple(
            added(d, x, axis, weight) if trained else d for d, x, axis, weight, trained in parts
        )

    return jax.lax.fori_loop(0, _blocks(_vocabulary(kind.vocab_axes, head))[0], block, dhead)


def _vocabulary(vocab_axes: tuple[int, ...], head: Matrices) -> int:
    return head[0].shape[vocab_axes[0]]


def _blocks(vocabulary: int) -> tuple[int, int]:
    """Number and size of the blocks; the last may reach back into the one before it."""
    blocks = -(-vocabulary // COLUMNS)
    # whole vectors of a CPU and tiles of a GPU
    return blocks, min(vocabulary, -(-vocabulary // (blocks * 128)) * 128)


def _block(
    vocab_axes: tuple[int, ...], head: Matrices, i: jax.Array
) -> tuple[Arrays, jax.Array, jax.Array]:
    """Block i of each matrix, the tokens in it, and which of them no block before it held."""
    vocabulary = _vocabulary(vocab_axes, head)
    _, size = _blocks(vocabulary)
    start = jnp.minimum(i * size, vocabulary - size)
    ids = start + jnp.arange(size)
    # Held to the block: XLA:CPU would convert the whole head before the loop, and keep that.
    head, start = jax.lax.optimization_barrier((head, start))
    weights = tuple(
        whole(_like(weight, jax.lax.dynamic_slice_in_dim(_held(weight), start, size, axis)))
        for weight, axis in zip(head, vocab_axes)
    )
    return weights, ids, ids >= i * size
