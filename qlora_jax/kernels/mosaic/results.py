"""Device code of the Mosaic GPU kernels: writes the tensor cores' sums to the result.

The form of the operand decides which threads hold the sums, and the order of the features; see
`operand.Operand`.
"""

import functools

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qlora_jax.kernels.mosaic.instructions import (
    THREADS,
    add,
    address,
    as_index,
    constant,
    extract,
    f32,
    index_of,
    mul,
    thread_id,
)
from qlora_jax.kernels.mosaic.operand import SPLIT_M, WARPS, Operand, ThreadIndex, ownership


def store(
    operand: Operand,
    total: fa.FragmentedArray,
    scratch: ir.Value,
    out: ir.Value,
    m: ir.Value,
    o: ir.Value,
    dtype: ir.Type,
) -> None:
    """Writes tile (m, o) of `out`, rounded to `dtype`.

    Args:
      operand: quantized operand of the product.
      total: sums that `fragments.product` returns.
      scratch: shared memory of at least WARPS * SPLIT_M * (operand.o + 8) words.
      out: result in device memory.
      m: index of the tile along the rows.
      o: index of the tile along the output features.
      dtype: dtype of the result.
    """
    if operand.split:
        _sum_warps(operand, total, scratch, out, m, o, dtype)
    elif operand.form == "wgmma":
        _store_transposed(operand, total, out, m, o, dtype)
    else:
        place = zip((m, o), total.shape)
        tile = tuple(utils.ds(as_index(mul(at, size)), size) for at, size in place)
        total.astype(dtype).store_untiled(utils.memref_slice(out, tile), optimized=False)


def _store_transposed(
    operand: Operand,
    total: fa.FragmentedArray,
    out: ir.Value,
    m: ir.Value,
    o: ir.Value,
    dtype: ir.Type,
) -> None:
    """Writes the tile for the form "wgmma", where `total` is [o, m]."""
    rows, stride = total.shape[1], ir.MemRefType(out.type).shape[1]
    o_index, row = divmod(ownership(total.layout, total.shape), rows)
    places = row * stride + operand.output(o_index)
    tile = add(mul(m, rows * stride), mul(o, operand.o))
    _scatter(total, places, address(utils.memref_ptr(out), tile, dtype), dtype)


def _sum_warps(
    operand: Operand,
    total: fa.FragmentedArray,
    scratch: ir.Value,
    out: ir.Value,
    m: ir.Value,
    o: ir.Value,
    dtype: ir.Type,
) -> None:
    """Writes the tile for the form "split": sums the rows of `total` over the four warps."""
    width = operand.o + 8  # without the 8, rows begin in one bank: slow writes
    row, o_index = divmod(ownership(total.layout, (WARPS * SPLIT_M, operand.o)), operand.o)
    words = row * width + operand.output(o_index)
    base = utils.memref_ptr(scratch)
    _scatter(total, words, base, f32())
    utils.warpgroup_barrier()
    each = SPLIT_M * operand.o // THREADS
    threads = operand.o // each  # threads per row
    thread = thread_id()
    r = arith.divui(thread, constant(threads))
    column = mul(arith.remui(thread, constant(threads)), each)
    own = address(base, add(mul(r, width), column), f32())
    kind = ir.VectorType.get((each,), f32())
    parts = [
        llvm.load(kind, address(own, w * SPLIT_M * width, f32()), alignment=16)
        for w in range(WARPS)
    ]
    result = functools.reduce(arith.addf, parts)
    if dtype != f32():
        result = arith.truncf(ir.VectorType.get((each,), dtype), result)
    stride = ir.MemRefType(out.type).shape[1]
    target = add(mul(add(mul(m, SPLIT_M), r), stride), add(mul(o, operand.o), column))
    llvm.store(result, address(utils.memref_ptr(out), target, dtype), alignment=2 * each)


def _scatter(array: fa.FragmentedArray, places: np.ndarray, base: ir.Value, dtype: ir.Type) -> None:
    """Stores an array's elements at base + `places` [warps, lanes, *registers, vector]."""
    bases: dict[ThreadIndex, ir.Value] = {}
    for register in np.ndindex(places.shape[2:]):
        index = places[(slice(None), slice(None), *register)]
        place = ThreadIndex.of(index - index[0, 0])
        if place not in bases:
            bases[place] = address(base, index_of(place), dtype)
        value = extract(array.registers[register[:-1]], register[-1])
        if dtype != array.mlir_dtype:
            value = arith.truncf(dtype, value)
        llvm.store(value, address(bases[place], int(index[0, 0]), dtype))
