"""Attention in plain XLA, in blocks of queries and keys; runs on every device.

The softmax is online (FlashAttention, arXiv 2205.14135). The sums over keys are relative to the
largest score so far; each block of keys updates them. A block of keys is skipped if no query of the
block of queries sees it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

QUERIES = 256
"""Queries per block; only the scores of one block exist at a time."""

KEYS = 1024
"""Keys per block; only the scores of one block exist at a time."""

UNSEEN = float(jnp.finfo(jnp.float32).min)
"""The score of a key that a query does not see."""


class _Sums(NamedTuple):
    """Sums over the keys that a block of R queries has seen: float32[B, H_kv, H / H_kv, R, ...]."""

    highest: jax.Array
    """[..., 1], the largest score."""
    total: jax.Array
    """[..., 1], the sum of exp(score - highest)."""
    mean: jax.Array
    """[..., D], the sum of exp(score - highest) times the value."""


def forward(
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the attention and the normalizer of its softmax; for the arguments see `attend`.

    Returns:
      Attention, [B, T, H, D] in q's dtype; and normalizer log(Σ exp(score)), float32[B, H, T].
    """
    length, keys = q.shape[1], min(KEYS, k.shape[1])
    q, first, last = (_padded(x, 1) for x in (q, first, last))

    def rows(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        taken, low, high = (_part(x, i, QUERIES) for x in (q, first, last))
        groups = _grouped(taken, k)

        def block(j: jax.Array, sums: _Sums) -> _Sums:
            kj, vj = _part(k, j, keys), _part(v, j, keys)
            scores = _scores(scale, softcap, groups, kj)
            scores = jnp.where(_seen(low, high, j, keys, k.shape[1]), scores, UNSEEN)
            highest = jnp.maximum(sums.highest, scores.max(axis=-1, keepdims=True))
            powers, shrink = jnp.exp(scores - highest), jnp.exp(sums.highest - highest)
            return _Sums(
                highest,
                sums.total * shrink + powers.sum(axis=-1, keepdims=True),
                sums.mean * shrink + _einsum("bkgts,bskd->bkgtd", powers.astype(v.dtype), vj),
            )

        sums = _over_keys(block, _nothing(groups), low, high, keys, k.shape[1])
        out = jnp.moveaxis(sums.mean / sums.total, 3, 1).reshape(taken.shape)
        normalizer = (sums.highest + jnp.log(sums.total)).reshape(_by_head(taken))
        return _put(done[0], out, i, 1), _put(done[1], normalizer, i, 2)

    empty = jnp.zeros(q.shape, q.dtype), jnp.zeros(_by_head(q), jnp.float32)
    out, normalizer = jax.lax.fori_loop(0, _count(q.shape[1], QUERIES), rows, empty)
    return out[:, :length], normalizer[:, :, :length]


def backward(
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
    out: jax.Array,
    normalizer: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v, each in its dtype.

    The arguments before `out` are those of `forward`.

    Args:
      out: first result of `forward`.
      normalizer: second result of `forward`.
      g: gradient of out.
    """
    length, keys = q.shape[1], min(KEYS, k.shape[1])
    q, first, last, out = (_padded(x, 1) for x in (q, first, last, out))
    normalizer = _padded(normalizer, 2)
    # the gradient of the queries that `_padded` repeated is zero
    g = jnp.pad(g, [(0, 0), (0, q.shape[1] - length), (0, 0), (0, 0)])

    def rows(i: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        taken, low, high = (_part(x, i, QUERIES) for x in (q, first, last))
        out_, g_ = _part(out, i, QUERIES), _part(g, i, QUERIES)
        groups, slopes = _grouped(taken, k), _grouped(g_, k)
        whole = _part(normalizer, i, QUERIES, 2).reshape(_nothing(groups).total.shape)
        # the gradient of the softmax subtracts Σ_j weight_j · gradient_j, which equals g · out
        mean = _grouped((_wide(g_) * _wide(out_)).sum(axis=-1, keepdims=True), k)
        mean = jnp.moveaxis(mean, 1, 3)

        def block(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = sums
            kj, vj = _part(k, j, keys), _part(v, j, keys)
            scores = _scores(scale, softcap, groups, kj)
            seen = _seen(low, high, j, keys, k.shape[1])
            weights = jnp.where(seen, jnp.exp(scores - whole), 0)
            change = _einsum("btkgd,bskd->bkgts", slopes, vj)
            change = weights * (change - mean) * scale
            if softcap is not None:
                change *= 1 - (scores / softcap) ** 2
            change, weights = change.astype(q.dtype), weights.astype(q.dtype)
            dq += _einsum("bkgts,bskd->btkgd", change, kj)
            dk = _added(dk, _einsum("bkgts,btkgd->bskd", change, groups), j, keys)
            return dq, dk, _added(dv, _einsum("bkgts,btkgd->bskd", weights, slopes), j, keys)

        dq, dk, dv = done
        zero = jnp.zeros(groups.shape, jnp.float32)
        part, dk, dv = _over_keys(block, (zero, dk, dv), low, high, keys, k.shape[1])
        return _put(dq, part.reshape(taken.shape), i, 1), dk, dv

    wide = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    empty = jnp.zeros(q.shape, q.dtype), *wide
    dq, dk, dv = jax.lax.fori_loop(0, _count(q.shape[1], QUERIES), rows, empty)
    return dq[:, :length], dk.astype(k.dtype), dv.astype(v.dtype)


def _over_keys(
    block: Callable[[Any, Any], Any],
    sums: Any,
    low: jax.Array,
    high: jax.Array,
    keys: int,
    length: int,
) -> Any:
    """Applies `block(j, sums)` to the blocks of keys from the first to the last that is seen."""
    if length == keys:
        return block(0, sums)
    return jax.lax.fori_loop(low.min() // keys, high.max() // keys + 1, block, sums)


def _count(length: int, size: int) -> int:
    return -(-length // size)


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """Pads an axis to whole blocks of queries by repeating its last entry.

    An axis of at most one block is not padded.
    """
    length = x.shape[axis]
    if length <= QUERIES:
        return x
    pad = [(0, -length % QUERIES if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pad, mode="edge")


def _begin(i: jax.Array, size: int, length: int) -> jax.Array:
    """Returns the start of block i; the last block overlaps the block before it."""
    return jnp.minimum(i * size, max(length - size, 0))


def _part(x: jax.Array, i: jax.Array, size: int, axis: int = 1) -> jax.Array:
    length = x.shape[axis]
    if length <= size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, _begin(i, size, length), size, axis)


def _put(whole: jax.Array, part: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """Returns `whole` with block i of queries replaced."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), i * QUERIES, axis)


def _added(whole: jax.Array, part: jax.Array, j: jax.Array, keys: int) -> jax.Array:
    """Returns `whole` with `part` added to block j of keys."""
    start = _begin(j, keys, whole.shape[1])
    old = jax.lax.dynamic_slice_in_dim(whole, start, keys, 1)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, 1)


def _seen(low: jax.Array, high: jax.Array, j: jax.Array, keys: int, length: int) -> jax.Array:
    """Returns the mask of the keys of block j that each query sees, bool[B, 1, 1, R, keys].

    Keys that were already in the block before are masked out.
    """
    places = _begin(j, keys, length) + jnp.arange(keys)
    low = jnp.maximum(low, j * keys)[..., None]
    return ((places >= low) & (places <= high[..., None]))[:, None, None]


def _nothing(groups: jax.Array) -> _Sums:
    """Returns the initial sums, before any key, for queries [B, R, H_kv, G, D]."""
    batch, rows, heads, group, size = groups.shape
    one = jnp.zeros((batch, heads, group, rows, 1), jnp.float32)
    return _Sums(one + UNSEEN, one, jnp.broadcast_to(one, (*one.shape[:-1], size)))


def _by_head(x: jax.Array) -> tuple[int, int, int]:
    """Returns the shape (B, H, T) for x [B, T, H, D]."""
    return x.shape[0], x.shape[2], x.shape[1]


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """Reshapes [B, T, H, D] to [B, T, H_kv, H / H_kv, D]."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1])


def _scores(scale: float, softcap: float | None, groups: jax.Array, k: jax.Array) -> jax.Array:
    scores = _einsum("btkgd,bskd->bkgts", groups, k) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
