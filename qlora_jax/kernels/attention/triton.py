"""Attention kernels that keep scores in registers, in Pallas on Triton (sm_80 and newer).

The scores of a block of queries and a block of keys exist only in registers, in both passes
(FlashAttention 2, arXiv 2307.08691). There are three kernels. The first computes the result and the
normalizer of each softmax, the second the gradient of queries, and the third the gradients of keys
and values, summed over the queries that see them. Each kernel skips blocks in which no query sees a
key. The arrays are not padded; elements beyond their edges are masked.

Within the kernels scores are multiplied by log2(e), because a GPU computes exponentials of base 2.

Offsets count elements in 32 signed bits, and in 64 bits if an array has more than 2^32 bytes
(`kernels/row_parts.py`). An array of 16-bit values has 2^31 elements at this size, so no offset
overflows. A masked offset beyond the end of the last row may overflow, but it is not used.
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

Ref = Any
"""A reference to an array, or to a part of one, in a kernel."""

INTERPRET = False
"""True runs the kernels as plain JAX on any device; for tests."""

LOG2_E = math.log2(math.e)

LOWEST = -1e30
"""A number below every score. It is finite, so that LOWEST - LOWEST is 0 and not NaN."""


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

    The result of a query that sees no key is zero.

    Returns:
      Attention, [B, T, H, D] in q's dtype; and normalizer log(Σ exp(score)), float32[B, H, T].
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

    The arguments before `out` are those of `forward`.

    Args:
      out: first result of `forward`.
      normalizer: second result of `forward`.
      g: gradient of out.
    """
    batch, length, heads, size = q.shape
    blocks, scores = blocks_for(compiled_for(), size), _Scores(scale, softcap)
    # the gradient of the softmax subtracts Σ_j weight_j · gradient_j, which equals g · out
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    inputs = q, k, v, g, normalizer, mean, first, last
    grid = pl.cdiv(length, blocks.queries.queries), heads, batch
    (dq,) = _call(_queries_kernel, scores, blocks.queries, grid, (q,))(*inputs)
    grid = pl.cdiv(k.shape[1], blocks.keys.keys), k.shape[2], batch
    seeing = _seeing(blocks.keys, k.shape[1], first, last)
    dk, dv = _call(_keys_kernel, scores, blocks.keys, grid, (k, v))(*inputs, *seeing)
    return dq, dk, dv


class _Scores(NamedTuple):
    """The map from products of queries and keys to scores.

    Attributes:
      scale: factor on the products.
      softcap: c in c·tanh(score/c), applied after scaling; None applies no cap.
    """

    scale: float
    softcap: float | None

    def of(self, products: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """Returns scores · log2(e), and the derivative of the scores with respect to products."""
        if self.softcap is None:
            return products * (self.scale * LOG2_E), self.scale
        # for large arguments the exponential is 0 or infinite, so tanh is 1 or -1 and never NaN
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
    """Returns a kernel as a function of arrays; `results` give the shapes and dtypes it returns."""
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
    """Returns the range of query blocks that may see each block of keys.

    The range contains every block that sees a key, for any order of `first` and `last`. If both
    never decrease, it contains no other block.

    Returns:
      Begin and end (exclusive) of the range, each int32[B, blocks of keys].
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
    """A block of queries of one head, with the ranges of keys that they see.

    Attributes:
      row: row of the batch.
      head: head of the queries.
      kv_head: head of the keys and values.
      places: positions of the queries in the row, int32[queries]; some may be beyond its end.
      first: first key seen, int32[queries]; a query beyond the end sees no key.
      last: last key seen, int32[queries].
    """

    row: jax.Array
    head: jax.Array
    kv_head: jax.Array
    places: jax.Array
    first: jax.Array
    last: jax.Array

    @classmethod
    def of_program(cls, block: Block, q: Ref, k: Ref, first: Ref, last: Ref) -> "_Queries":
        """Returns the queries of the running program, in a kernel with a grid over queries."""
        # with causal masks the last block takes the longest, so it runs first
        part = pl.num_programs(0) - 1 - pl.program_id(0)
        head, row = pl.program_id(1), pl.program_id(2)
        return cls.of(block, part, row, head, jax.lax.div(head, _group(q, k)), k, first, last)

    @classmethod
    def of(
        cls,
        block: Block,
        part: jax.Array,
        row: jax.Array,
        head: jax.Array,
        kv_head: jax.Array,
        k: Ref,
        first: Ref,
        last: Ref,
    ) -> "_Queries":
        """Returns block number `part` of the queries of one row and head."""
        places = part * block.queries + jnp.arange(block.queries)
        first = _numbers(first, (row,), places, k.shape[1])
        return cls(row, head, kv_head, places, first, _numbers(last, (row,), places, -1))

    def see(self, keys: jax.Array) -> jax.Array:
        """Returns the mask of the keys that each query sees, bool[queries, keys]."""
        return (self.first[:, None] <= keys[None]) & (keys[None] <= self.last[:, None])

    def over_keys(
        self, size: int, step: Callable[[jax.Array, jax.Array | None, _Sums], _Sums], sums: _Sums
    ) -> _Sums:
        """Applies `step(keys, seen, sums)` to each block of keys that some query sees.

        Args:
          size: keys per block.
          step: function of the positions of the keys, the mask and the sums. The mask is None if
            all queries see all keys of the block. This is so in most blocks of long sequences, and
            there the mask would take as much time as a product.
          sums: initial sums.
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


def _forward_kernel(
    scores: _Scores,
    block: Block,
    q: Ref,
    k: Ref,
    v: Ref,
    first: Ref,
    last: Ref,
    out: Ref,
    normalizers: Ref,
) -> None:
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
    total = jnp.where(total > 0, total, 1)  # a query that sees no key has total 0
    _store(out, queries.row, queries.places, queries.head, mean / total[:, None])
    place = normalizers.at[queries.row, queries.head, queries.places]
    inside = queries.places < normalizers.shape[2]
    plt.store(place, (highest + jnp.log2(total)) / LOG2_E, mask=inside)


def _queries_kernel(
    scores: _Scores,
    block: Block,
    q: Ref,
    k: Ref,
    v: Ref,
    g: Ref,
    normalizers: Ref,
    means: Ref,
    first: Ref,
    last: Ref,
    dq: Ref,
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


def _keys_kernel(scores: _Scores, block: Block, *refs: Ref) -> None:
    q, k, v, g, normalizers, means, first, last, begin, end, dk, dv = refs
    part, kv_head, row = (pl.program_id(i) for i in range(3))
    keys = part * block.keys + jnp.arange(block.keys)
    own, values = (_load(x, row, keys, kv_head) for x in (k, v))
    group, begins = _group(q, k), begin[row, part]

    def step(i: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # the loop runs over the heads of the group first, then over the blocks of queries
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


def _group(q: Ref, k: Ref) -> int:
    return q.shape[2] // k.shape[2]


def _numbers(ref: Ref, lead: tuple[jax.Array, ...], places: jax.Array, beyond: int) -> jax.Array:
    """Loads ref[*lead, places], with the value `beyond` for places after the end."""
    return plt.load(ref.at[(*lead, places)], mask=places < ref.shape[-1], other=beyond)


def _load(ref: Ref, row: jax.Array, places: jax.Array, head: jax.Array) -> jax.Array:
    """Loads ref[row, places, head], 0 beyond its edges; features are padded to a power of two."""
    place, inside = _at(ref, row, places, head)
    return plt.load(place, mask=inside, other=0)


def _store(ref: Ref, row: jax.Array, places: jax.Array, head: jax.Array, values: jax.Array) -> None:
    place, inside = _at(ref, row, places, head)
    plt.store(place, values.astype(ref.dtype), mask=inside)


def _at(ref: Ref, row: jax.Array, places: jax.Array, head: jax.Array) -> tuple[Any, jax.Array]:
    width = padded(ref.shape[3])
    places, features = places[:, None], jnp.arange(width)[None]
    inside = jnp.broadcast_to(places < ref.shape[1], (len(places), width))
    if width > ref.shape[3]:
        inside &= features < ref.shape[3]
    return ref.at[row, places, head, features], inside


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
