"""Attention in blocks that stay on the chip, as Pallas kernels on the Triton backend (sm_80 on).

Scores of a block of queries and a block of keys exist in registers alone, forward and backward
(FlashAttention 2, arXiv 2307.08691). There are three kernels: the result and the normalizer of each
softmax; the gradient of queries; the gradients of keys and values, summed over the queries that see
them. Each passes over blocks in which no query sees a key, and reads and writes the arrays as they
are: what is beyond their edges is masked.

Within the kernels scores are in units of log2: a GPU's exponential is one of base 2.

Offsets count elements, in 32 signed bits, and in 64 where an array has more than 2^32 bytes
(`kernels/parts.py`): of 16 bits these are 2^31 elements, so no offset outgrows its bits. Those that
are masked, beyond the end of the last row, may; they are not used.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.kernels.attention.blocks import Block, blocks_for, padded
from qlora_jax.kernels.target import compiled_for

INTERPRET = False
"""Run the kernels as plain JAX, on any device; for tests."""

LOG2_E = math.log2(math.e)

LOWEST = -1e30
"""Below every score, and finite: two of them differ by 0, not by NaN."""


def forward(
    scale: float,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the attention and what its softmax is divided by; the arguments are `attend`'s.

    A query that sees no key gets zeros.

    Returns:
      [B, T, H, D] in q's dtype; and float32[B, H, T], the logarithm of the sum of exp(score).
    """
    batch, length, heads, size = q.shape
    block = blocks_for(compiled_for(), size).forward
    normalizers = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    grid = pl.cdiv(length, block.queries), heads, batch
    call = _call(_forward_kernel, _Scores(scale, softcap), block, grid, (q, normalizers))
    return call(q, k, v, first, last)


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

    Args:
      scale, softcap, q, k, v, first, last: as `forward` takes them.
      out, normalizer: what it returned.
      g: the gradient of out.
    """
    batch, length, heads, size = q.shape
    blocks, scores = blocks_for(compiled_for(), size), _Scores(scale, softcap)
    # the mean slope over all keys, which the softmax takes off each one
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    inputs = q, k, v, g, normalizer, mean, first, last
    grid = pl.cdiv(length, blocks.queries.queries), heads, batch
    (dq,) = _call(_queries_kernel, scores, blocks.queries, grid, (q,))(*inputs)
    grid = pl.cdiv(k.shape[1], blocks.keys.keys), k.shape[2], batch
    seeing = _seeing(blocks.keys, k.shape[1], first, last)
    dk, dv = _call(_keys_kernel, scores, blocks.keys, grid, (k, v))(*inputs, *seeing)
    return dq, dk, dv


class _Scores(NamedTuple):
    """How products of queries and keys become scores.

    Attributes:
      scale: factor on the products.
      softcap: c in c·tanh(score/c), after scaling; None: scores as they are.
    """

    scale: float
    softcap: float | None

    def of(self, products: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """Returns the scores in units of log2, and the slope of the scores in units of 1."""
        if self.softcap is None:
            return products * (self.scale * LOG2_E), self.scale
        # the exponential is 0 or infinite for large arguments, and tanh 1 or -1, never NaN
        power = jnp.exp2(products * (2 * LOG2_E * self.scale / self.softcap))
        tanh = 1 - 2 / (1 + power)
        return tanh * (self.softcap * LOG2_E), self.scale * (1 - tanh * tanh)


def _call(
    kernel: Callable[..., None],
    scores: _Scores,
    block: Block,
    grid: tuple[int, int, int],
    results: tuple[Any, ...],
) -> Callable[..., Any]:
    """Returns a kernel as a function of arrays; `results` have the shapes of what it returns."""
    return pl.pallas_call(
        functools.partial(kernel, scores, block),
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
        grid=grid,
        interpret=INTERPRET,
        compiler_params=plt.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        name=f"attention{kernel.__name__}",
    )


def _seeing(
    block: Block, keys: int, first: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns which blocks of queries may see each block of keys, from one up to another.

    Between them are all that do, whatever the order of `first` and `last`; and no others, where
    both never decrease.

    Returns:
      Both int32[B, blocks of keys]; the second is excluded.
    """
    pad = (0, 0), (0, -first.shape[1] % block.queries)
    least, most = (
        reduced(jnp.pad(x, pad, mode="edge").reshape(len(x), -1, block.queries), axis=-1)
        for reduced, x in ((jnp.min, first), (jnp.max, last))
    )
    start = jnp.arange(0, keys, block.keys, dtype=jnp.int32)[:, None]
    some = (least[:, None] < start + block.keys) & (most[:, None] >= start)
    index = jnp.arange(least.shape[1], dtype=jnp.int32)
    begin = jnp.min(jnp.where(some, index, len(index)), axis=-1)
    return begin, jnp.max(jnp.where(some, index + 1, 0), axis=-1)


_Sums = TypeVar("_Sums")


class _Queries(NamedTuple):
    """A block of queries of one head, with what they see.

    Attributes:
      row: of the batch.
      head, kv_head: of the queries and of the keys.
      places: int32[queries], where in the row; some may be beyond its end.
      first, last: int32[queries], the keys seen: none beyond the end.
    """

    row: jax.Array
    head: jax.Array
    kv_head: jax.Array
    places: jax.Array
    first: jax.Array
    last: jax.Array

    @classmethod
    def of_program(cls, block: Block, q, k, first, last) -> "_Queries":
        """Returns those of the running program, in a kernel whose grid is one of queries."""
        # where a query sees all before it, the last block takes longest: it begins first
        part = pl.num_programs(0) - 1 - pl.program_id(0)
        head, row = pl.program_id(1), pl.program_id(2)
        return cls.of(block, part, row, head, jax.lax.div(head, _group(q, k)), k, first, last)

    @classmethod
    def of(cls, block: Block, part, row, head, kv_head, k, first, last) -> "_Queries":
        """Returns block `part` of the queries of a row's head."""
        places = part * block.queries + jnp.arange(block.queries)
        first = _numbers(first, (row,), places, k.shape[1])
        return cls(row, head, kv_head, places, first, _numbers(last, (row,), places, -1))

    def see(self, keys: jax.Array) -> jax.Array:
        """Returns bool[queries, keys]."""
        return (self.first[:, None] <= keys[None]) & (keys[None] <= self.last[:, None])

    def over_keys(
        self, size: int, step: Callable[[jax.Array, jax.Array | None, _Sums], _Sums], sums: _Sums
    ) -> _Sums:
        """Returns `step(keys, seen, sums)` over the blocks of keys that some query sees.

        Args:
          size: keys of a block.
          step: gets the places of keys and the mask of them; None where all queries see all keys,
            which for long sequences is most blocks: there the mask would take as long as a product.
          sums: what the first step begins with.
        """
        begin, end = jax.lax.div(jnp.min(self.first), size), jax.lax.div(jnp.max(self.last), size)
        end += 1
        whole_begin = jax.lax.div(jnp.max(self.first) + (size - 1), size)
        whole_begin = jnp.clip(whole_begin, begin, end)
        whole_end = jnp.clip(jax.lax.div(jnp.min(self.last) + 1, size), whole_begin, end)
        whole = whole_end - whole_begin

        def unmasked(i: jax.Array, sums: _Sums) -> _Sums:
            return step(i * size + jnp.arange(size), None, sums)

        def masked(i: jax.Array, sums: _Sums) -> _Sums:
            keys = jnp.where(i < whole_begin, i, i + whole) * size + jnp.arange(size)
            return step(keys, self.see(keys), sums)

        sums = jax.lax.fori_loop(whole_begin, whole_end, unmasked, sums)
        return jax.lax.fori_loop(begin, end - whole, masked, sums)


def _forward_kernel(scores: _Scores, block: Block, q, k, v, first, last, out, normalizers) -> None:
    queries = _Queries.of_program(block, q, k, first, last)
    own = _load(q, queries.row, queries.places, queries.head)

    def step(
        keys: jax.Array, seen: jax.Array | None, sums: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, highest, total = sums
        score, _ = scores.of(_dot(own, _load(k, queries.row, keys, queries.kv_head).T))
        score = score if seen is None else jnp.where(seen, score, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(score, axis=1))
        shrink, powers = jnp.exp2(highest - higher), jnp.exp2(score - higher[:, None])
        values = _load(v, queries.row, keys, queries.kv_head)
        mean = mean * shrink[:, None] + _dot(powers.astype(values.dtype), values)
        return mean, higher, total * shrink + jnp.sum(powers, axis=1)

    zero = jnp.zeros((block.queries,), jnp.float32)
    nothing = jnp.zeros(own.shape, jnp.float32), zero + LOWEST, zero
    mean, highest, total = queries.over_keys(block.keys, step, nothing)
    total = jnp.where(total > 0, total, 1)  # of a query that sees nothing
    _store(out, queries.row, queries.places, queries.head, mean / total[:, None])
    place = normalizers.at[queries.row, queries.head, queries.places]
    inside = queries.places < normalizers.shape[2]
    plt.store(place, (highest + jnp.log2(total)) / LOG2_E, mask=inside)


def _queries_kernel(
    scores: _Scores, block: Block, q, k, v, g, normalizers, means, first, last, dq
) -> None:
    queries = _Queries.of_program(block, q, k, first, last)
    own, slope = (_load(x, queries.row, queries.places, queries.head) for x in (q, g))
    lead = queries.row, queries.head
    normalizer = LOG2_E * _numbers(normalizers, lead, queries.places, 0)[:, None]
    mean = _numbers(means, lead, queries.places, 0)[:, None]

    def step(keys: jax.Array, seen: jax.Array | None, total: jax.Array) -> jax.Array:
        theirs, values = (_load(x, queries.row, keys, queries.kv_head) for x in (k, v))
        score, rise = scores.of(_dot(own, theirs.T))
        weights = jnp.exp2(score - normalizer)
        weights = weights if seen is None else jnp.where(seen, weights, 0)
        change = weights * (_dot(slope, values.T) - mean) * rise
        return total + _dot(change.astype(theirs.dtype), theirs)

    total = queries.over_keys(block.keys, step, jnp.zeros(own.shape, jnp.float32))
    _store(dq, queries.row, queries.places, queries.head, total)


def _keys_kernel(scores: _Scores, block: Block, *refs: Any) -> None:
    q, k, v, g, normalizers, means, first, last, begin, end, dk, dv = refs
    part, kv_head, row = (pl.program_id(i) for i in range(3))
    keys = part * block.keys + jnp.arange(block.keys)
    own, values = (_load(x, row, keys, kv_head) for x in (k, v))
    group, begins = _group(q, k), begin[row, part]

    def step(i: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # one head of the group after the other, then the next queries
        head = kv_head * group + jax.lax.rem(i, group)
        where = begins + jax.lax.div(i, group)
        queries = _Queries.of(block, where, row, head, kv_head, k, first, last)
        theirs, slope = (_load(x, row, queries.places, head) for x in (q, g))
        normalizer = LOG2_E * _numbers(normalizers, (row, head), queries.places, 0)
        mean = _numbers(means, (row, head), queries.places, 0)
        score, rise = scores.of(_dot(own, theirs.T))
        weights = jnp.where(queries.see(keys).T, jnp.exp2(score - normalizer[None]), 0)
        change = weights * (_dot(values, slope.T) - mean[None]) * rise
        return (
            totals[0] + _dot(change.astype(theirs.dtype), theirs),
            totals[1] + _dot(weights.astype(slope.dtype), slope),
        )

    nothing = jnp.zeros(own.shape, jnp.float32)
    steps = (end[row, part] - begins) * group
    totals = jax.lax.fori_loop(0, steps, step, (nothing, nothing))
    for ref, total in zip((dk, dv), totals):
        _store(ref, row, keys, kv_head, total)


def _group(q, k) -> int:
    return q.shape[2] // k.shape[2]


def _numbers(ref, lead: tuple[jax.Array, ...], places: jax.Array, beyond: int) -> jax.Array:
    """ref[*lead, places], and `beyond` beyond its end."""
    return plt.load(ref.at[(*lead, places)], mask=places < ref.shape[-1], other=beyond)


def _load(ref, row: jax.Array, places: jax.Array, head: jax.Array) -> jax.Array:
    """ref[row, places, head], with zeros beyond its edges, up to a power of two of features."""
    place, inside = _at(ref, row, places, head)
    return plt.load(place, mask=inside, other=0)


def _store(ref, row: jax.Array, places: jax.Array, head: jax.Array, values: jax.Array) -> None:
    place, inside = _at(ref, row, places, head)
    plt.store(place, values.astype(ref.dtype), mask=inside)


def _at(ref, row: jax.Array, places: jax.Array, head: jax.Array) -> tuple[Any, jax.Array]:
    width = padded(ref.shape[3])
    places, features = places[:, None], jnp.arange(width)[None]
    inside = jnp.broadcast_to(places < ref.shape[1], (len(places), width))
    if width > ref.shape[3]:
        inside &= features < ref.shape[3]
    return ref.at[row, places, head, features], inside


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
