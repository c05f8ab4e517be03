"""Product kernels that decode inside the product, in Pallas on Triton (sm_80 and newer).

One program computes one tile of the result. It decodes the weights in registers, so the decoded
weight is never in memory. The code is deliberately simple: it serves jax 0.10, where Mosaic GPU
cannot be used below sm_90, and the other kernels are compared with it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.kernels.triton_tiles import TritonTile, tile_for
from qlora_jax.quant.double_quant import unfused
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import GROUP, QTensor

HALF = GROUP // 2

Ref = Any
"""A reference to an array, or a QTensor of references, in a kernel."""

INTERPRET = False
"""True runs the kernels as plain JAX on any device; for tests."""


def forward(x: jax.Array, q: QTensor) -> jax.Array:
    """Returns x @ W, [..., K] to [..., N] in x's dtype, accumulated in float32."""
    rows = x.reshape(math.prod(x.shape[:-1]), q.in_features)
    tile = tile_for(rows.shape[0], rows.dtype)
    grid = (pl.cdiv(rows.shape[0], tile.m), pl.cdiv(q.shape[-1], tile.n))
    y = _call(functools.partial(_forward_kernel, tile), grid, tile, rows, q, q.shape[-1])
    return y.reshape(*x.shape[:-1], q.shape[-1])


def backward(g: jax.Array, q: QTensor) -> jax.Array:
    """Returns g @ W.T, [..., N] to [..., K] in g's dtype, accumulated in float32."""
    rows = g.reshape(math.prod(g.shape[:-1]), q.shape[-1])
    tile = tile_for(rows.shape[0], rows.dtype)
    grid = (pl.cdiv(rows.shape[0], tile.m), pl.cdiv(q.in_features, GROUP))
    dx = _call(functools.partial(_backward_kernel, tile), grid, tile, rows, q, q.in_features)
    return dx.reshape(*g.shape[:-1], q.in_features)


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, int],
    tile: TritonTile,
    rows: jax.Array,
    q: QTensor,
    features: int,
) -> jax.Array:
    result = jax.ShapeDtypeStruct((rows.shape[0], features), rows.dtype)
    if 0 in (*result.shape, *rows.shape):
        return jnp.zeros(result.shape, result.dtype)
    if q.offset is not None:
        q = dataclasses.replace(q, offset=q.offset[None])
    call = pl.pallas_call(
        kernel,
        result,
        grid=grid,
        interpret=INTERPRET,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    )
    return call(rows, q, jnp.asarray(dynamic_map()))


def _forward_kernel(tile: TritonTile, x: Ref, q: Ref, table: Ref, y: Ref) -> None:
    rows = pl.program_id(0) * tile.m + jnp.arange(tile.m)[:, None]
    columns = pl.program_id(1) * tile.n + jnp.arange(tile.n)[None, :]

    def group(i: jax.Array, total: jax.Array) -> jax.Array:
        for half, w in enumerate(_decode(q, table, i, columns)):
            k = _elements(i, half)
            part = _load(x, rows, k)
            total += _dot(part, w.astype(part.dtype))
        return total

    total = jax.lax.fori_loop(0, q.codes.shape[0] // HALF, group, jnp.zeros((tile.m, tile.n)))
    _store(y, rows, columns, total)


def _backward_kernel(tile: TritonTile, g: Ref, q: Ref, table: Ref, dx: Ref) -> None:
    rows = pl.program_id(0) * tile.m + jnp.arange(tile.m)[:, None]
    i = pl.program_id(1)

    def block(j: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns = j * tile.n + jnp.arange(tile.n)[None, :]
        part = _load(g, rows, columns)
        halves = _decode(q, table, i, columns)
        return tuple(t + _dot(part, w.astype(part.dtype).T) for t, w in zip(totals, halves))

    zeros = jnp.zeros((tile.m, HALF))
    totals = jax.lax.fori_loop(0, pl.cdiv(q.codes.shape[1], tile.n), block, (zeros, zeros))
    for half, total in enumerate(totals):
        _store(dx, rows, _elements(i, half), total)


def _decode(q: Ref, table: Ref, i: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decodes group i of W: its first and its last 32 rows, each float32[32, columns]."""
    packed = _load(q.codes, i * HALF + jnp.arange(HALF)[:, None], columns)
    halves = []
    for half, index in enumerate((packed & 15, packed >> 4)):
        block = (i * GROUP + half * HALF) // q.block_size
        blocks = jnp.full((1, 1), block)
        scale = _load(q.scales, blocks, columns)
        if q.nested is not None:
            nested = (columns * q.scales.shape[0] + block) // q.nested_block
            inside = nested < q.nested.shape[0]
            outer = plt.load(q.nested.at[nested], mask=inside, other=0)
            scale = unfused(plt.load(table.at[scale.astype(jnp.int32)]) * outer) + q.offset[0]
        halves.append(plt.load(q.codebook.at[index.astype(jnp.int32)]) * scale)
    return halves[0], halves[1]


def _elements(i: jax.Array, half: int) -> jax.Array:
    return i * GROUP + half * HALF + jnp.arange(HALF)[None, :]


def _load(ref: Ref, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Loads ref[rows, columns], with zeros beyond the edges."""
    inside = (rows < ref.shape[0]) & (columns < ref.shape[1])
    return plt.load(ref.at[rows, columns], mask=inside, other=0)


def _store(ref: Ref, rows: jax.Array, columns: jax.Array, values: jax.Array) -> None:
    inside = (rows < ref.shape[0]) & (columns < ref.shape[1])
    plt.store(ref.at[rows, columns], values.astype(ref.dtype), mask=inside)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # With the default precision, float32 operands would be rounded to TF32.
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)
