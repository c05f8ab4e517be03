"""Next-token cross-entropy as (sum, count), computed without storing all logits of a batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.kernels.dense import product
from qlora_jax.quant.sharded import Sharded, looked_up, whole
from qlora_jax.runtime import mesh

ROWS = 256
"""Positions that are computed at a time."""

ROWS_OF_PARTS = 2048
"""Positions computed at a time with a sharded head, which each chunk gathers again."""

COLUMNS = 4096
"""Largest number of vocabulary tokens whose logits exist at one time."""

LIFT = 2.0**12
"""Factor on exponentials (each at most 1) while they are in the compute dtype. Without the factor,
most probabilities of a large vocabulary would be subnormal in float16."""


Arrays = tuple[jax.Array, ...]
"""One array for each matrix of a head."""

Matrices = tuple[jax.Array | Sharded, ...]
"""The matrices of a head; a `Sharded` one holds the whole vocabulary and a part of each vector."""


class _Head(NamedTuple):
    """The static properties of a head, whose logits are the sum of h @ weight over its matrices.

    Attributes:
      vocab_axes: axis of the vocabulary in each matrix.
      trained: for each matrix, whether it needs a gradient.
      softcap: argument of `token_loss`.
    """

    vocab_axes: tuple[int, ...]
    trained: tuple[bool, ...]
    softcap: float | None

    def logits(self, h: Arrays, weights: Arrays) -> jax.Array:
        """Returns the logits of one vocabulary block, float32[R, block], softcap included."""
        parts = zip(h, weights, self.vocab_axes)
        products = [product(x, weight.astype(x.dtype), 1 - axis) for x, weight, axis in parts]
        logits = functools.reduce(jnp.add, products)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def sloped(self, values: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns values times the derivative of the softcap, 1 - (logits / softcap)²."""
        return values if self.softcap is None else values * (1 - (logits / self.softcap) ** 2)


class _Online(NamedTuple):
    """The running sums of the online softmax over the vocabulary, for R rows, all float32."""

    highest: jax.Array
    """[R], largest logit so far."""
    total: jax.Array
    """[R], sum of exp(logit - highest)."""
    target: jax.Array
    """[R], logit of the target."""
    mean: Arrays
    """[R, D] for each matrix of the head: sum over the vocabulary of exp(logit - highest) times the
    derivative of the softcap times the token's vector in the matrix."""


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
    """Returns the summed cross-entropy over the positions with loss, and the number of positions.

    The loss computes `ROWS` positions at a time, positions with loss first, and the vocabulary in
    blocks of at most `COLUMNS` tokens. Chunks without any loss are skipped. The forward pass
    computes the gradient with an online softmax. Without a softcap it is

        d loss / d hidden = sum over tokens v of p(v) · head[v]  -  head[target]

    This is the computation of attention over the vocabulary. With a softcap, each vector
    of the head is multiplied by the softcap's derivative. The gradient of the head, or of the
    matrix b of an update, computes the logits a second time.

    A sharded head is gathered one block of the vocabulary at a time, for `ROWS_OF_PARTS` positions.
    A chunk is skipped if no device has a position with loss in its own chunk.

    Args:
      hidden: hidden states, [..., D] in the compute dtype.
      head: head, [D, vocab], or [vocab, D] with vocab_axis 0; inside `jax.shard_map` a `Sharded`
        head is possible.
      targets: target tokens, int32[...].
      mask: positions with loss, bool[...].
      vocab_axis: axis of the vocabulary in the head.
      train_head: whether the head needs a gradient; if False, the head's gradient is zero.
      softcap: c in logits c·tanh(x / c); None leaves the logits unchanged.
      update: low [..., r] in the compute dtype and b [r, vocab]; low @ b is added to
        hidden @ head, and both arrays get gradients.

    Returns:
      float32 sum and float32 count.
    """
    # the products that add up to the logits: (input, matrix, axis of the vocabulary, trained)
    products = [(hidden, head, vocab_axis, train_head)]
    if update is not None:
        products.append((*update, 1, True))
    inputs, matrices, axes, trained = zip(*products)
    mask = mask.reshape(-1)
    split = isinstance(head, Sharded)
    rows = min(ROWS_OF_PARTS if split else ROWS, len(mask))
    order = jnp.argsort(~mask, stable=True)
    # The index len(order) makes `chunks` fill rows without loss with zeros, so that NaN or
    # infinity in such a row reaches no gradient.
    order = jnp.where(jnp.arange(len(order)) < mask.sum(), order, len(order))
    order = jnp.pad(order, (0, -len(order) % rows), constant_values=len(order))

    def chunks(x: jax.Array) -> jax.Array:
        taken = x.at[order].get(mode="fill", fill_value=0)
        return taken.reshape(-1, rows, *x.shape[1:])

    carrying = chunks(mask)
    busy = carrying.any(axis=-1)
    if split:  # the gather is a collective: all devices take part, or none
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


def _forward(
    kind: _Head,
    hidden: Arrays,
    head: Matrices,
    targets: jax.Array,
    mask: jax.Array,
    busy: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    def chunk(
        carry: tuple[jax.Array, Arrays], xs: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, Arrays], Arrays]:
        h, t, m, computes = xs

        def compute(dhead: Arrays) -> tuple[jax.Array, Arrays, Arrays]:
            seen = _over_vocabulary(kind, h, head, t, with_mean=True)
            dh = tuple(
                _input_gradient(kind, seen, mean, weight, axis, t, m, x.dtype)
                for mean, weight, axis, x in zip(seen.mean, head, kind.vocab_axes, h)
            )
            if any(kind.trained):
                dhead = _add_head_gradient(kind, dhead, h, head, t, m, seen)
            return _loss(seen, m), dh, dhead

        def skip(dhead: Arrays) -> tuple[jax.Array, Arrays, Arrays]:
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


def _input_gradient(
    kind: _Head,
    seen: _Online,
    mean: jax.Array,
    weight: jax.Array | Sharded,
    vocab_axis: int,
    targets: jax.Array,
    mask: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns the gradient with respect to the input of one matrix of the head, float32[R, D]."""
    # rounded to the compute dtype, because the vectors summed in `mean` were rounded to it too
    if isinstance(weight, Sharded):
        of_target = looked_up(weight, targets, vocab_axis).astype(dtype)
    else:
        of_target = jnp.take(weight, targets, axis=vocab_axis, mode="clip").astype(dtype)
        of_target = of_target.T if vocab_axis else of_target
    of_target = kind.sloped(of_target, seen.target[:, None])
    return (mean / seen.total[:, None] - of_target) * mask[:, None]


def _backward(kind: _Head, saved: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    dh, dhead, hidden, head = saved
    dhidden = tuple((slope * g).astype(x.dtype) for slope, x in zip(dh, hidden))
    grads = tuple(
        _like(weight, (slope * g).astype(_held(weight).dtype)) if trained else None
        for slope, weight, trained in zip(dhead, head, kind.trained)
    )
    return dhidden, grads, None, None, None


_total.defvjp(_forward, _backward)


def _held(weight: jax.Array | Sharded) -> Any:
    """Returns this device's shard of a matrix; an unsharded matrix is returned unchanged."""
    return weight.part if isinstance(weight, Sharded) else weight


def _like(weight: jax.Array | Sharded, held: jax.Array) -> jax.Array | Sharded:
    """Returns an array as a shard with the axes of `weight`; unchanged if `weight` is unsharded."""
    return Sharded(held, weight.axes) if isinstance(weight, Sharded) else held


def _loss(seen: _Online, mask: jax.Array) -> jax.Array:
    normalizer = seen.highest + jnp.log(seen.total)
    return jnp.sum(jnp.where(mask, normalizer - seen.target, 0))


def _over_vocabulary(
    kind: _Head, h: Arrays, head: Matrices, targets: jax.Array, *, with_mean: bool
) -> _Online:
    """Runs over the vocabulary block by block; without `with_mean`, `mean` stays zero."""

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
    """Returns the gradients of the trained matrices with those of R rows added."""
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
    """Returns the number and the size of the blocks; the last may overlap the block before it."""
    blocks = -(-vocabulary // COLUMNS)
    # a multiple of 128 fills whole CPU vectors and GPU tiles
    return blocks, min(vocabulary, -(-vocabulary // (blocks * 128)) * 128)


def _block(
    vocab_axes: tuple[int, ...], head: Matrices, i: jax.Array
) -> tuple[Arrays, jax.Array, jax.Array]:
    """Returns block i of each matrix, its tokens, and which tokens no earlier block contained."""
    vocabulary = _vocabulary(vocab_axes, head)
    _, size = _blocks(vocabulary)
    start = jnp.minimum(i * size, vocabulary - size)
    ids = start + jnp.arange(size)
    # The barrier keeps the conversion of the dtype inside the loop. Without it, XLA:CPU converts
    # the whole head before the loop and holds the copy.
    head, start = jax.lax.optimization_barrier((head, start))
    weights = tuple(
        whole(_like(weight, jax.lax.dynamic_slice_in_dim(_held(weight), start, size, axis)))
        for weight, axis in zip(head, vocab_axes)
    )
    return weights, ids, ids >= i * size
