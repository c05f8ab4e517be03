"""Device code of the Mosaic GPU kernels: from codes in shared memory to operands of `mma`.

Runs per thread of a warpgroup, on registers. A weight reaches the tensor cores in three steps:
a byte of codes indexes a table of pairs of codebook values in shared memory, two entries give two
registers of the operand, and these are multiplied by the block's scale. Every lane has its own
copy of the table in its own memory bank, so that look-ups never collide. `operand.py` says where
everything is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.mma import MMALayouts, mma
from jax.experimental.mosaic.gpu.wgmma import WGMMAAccumulator, wgmma
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from qlora_jax.kernels.mosaic.operand import (
    LANES,
    SPLIT_M,
    WARPS,
    Found,
    Operand,
    Place,
    Register,
    code_layout,
    ownership,
    plan,
)

THREADS = WARPS * LANES
GROUP_ROWS = 64
"""Rows of the left operand of one `wgmma`."""
TABLE = (256, LANES)
"""Shape of the table of pairs, 32-bit words; entry b holds (codebook[b & 15], codebook[b >> 4])."""


def fill_table(table: ir.Value, codebook: ir.Value, dtype: ir.Type) -> None:
    """Writes the table of pairs in `dtype` from the sixteen float32 values; no barrier."""
    warp, lane = _warp(), _lane()
    values = utils.memref_ptr(codebook)

    def bits(index: ir.Value | int) -> ir.Value:
        rounded = arith.truncf(dtype, llvm.load(_f32(), _at(values, index, _f32())))
        return arith.extui(_i32(), utils.bitcast(rounded, _int(16)))

    share = TABLE[0] // WARPS
    words = _at(utils.memref_ptr(table), _add(_mul(warp, share * LANES), lane), _i32())
    low = [bits(i) for i in range(16)]
    for i in range(share // 16):
        high = arith.shli(bits(_add(_mul(warp, share // 16), i)), _c(16))
        for j in range(16):
            llvm.store(arith.ori(high, low[j]), _at(words, (i * 16 + j) * LANES, _i32()))


@dataclasses.dataclass(frozen=True)
class Scales:
    """Where a kernel finds a QTensor's block scales, as references to device memory.

    Attributes:
      blocks: float32 or uint8[nb, N].
      nested, offset, dynamic_map: float32, or None without double quantization.
      nested_block: scales per nested scale.
    """

    blocks: ir.Value
    nested: ir.Value | None
    offset: ir.Value | None
    dynamic_map: ir.Value | None
    nested_block: int

    @property
    def words(self) -> int:
        """32-bit words of `fetch` for each scale."""
        return 1 if self.nested is None else 2

    def prefetch(self, operand: Operand, o: ir.Value, step: ir.Value | int) -> None:
        """Asks for what `fetch` reads to be brought from device memory to the level 2 cache."""
        for pointers in self._pointers(operand, o, step):
            for pointer in pointers:
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"),
                    [pointer],
                    "prefetch.global.L2 [$0];",
                    "l",
                    has_side_effects=True,
                )

    def fetch(self, operand: Operand, o: ir.Value, step: ir.Value | int) -> list[ir.Value]:
        """Loads what this thread's scales of output tile `o`, step `step`, are made from.

        Returns:
          `words` 32-bit values for each scale.
        """
        found = []
        for block, *nested in self._pointers(operand, o, step):
            if nested:
                found.append(arith.extui(_i32(), llvm.load(_int(8), block)))
                found.append(llvm.load(_i32(), nested[0]))
            else:
                found.append(llvm.load(_i32(), block))
        return found

    def values(self, words: list[ir.Value]) -> list[ir.Value]:
        """Returns the scales, float32, of what `fetch` has loaded."""
        if self.nested is None:
            return [utils.bitcast(word, _f32()) for word in words]
        found = []
        for code, nested in zip(words[::2], words[1::2]):
            level = _load_f32(self.dynamic_map, code)
            product = arith.mulf(level, utils.bitcast(nested, _f32()))
            found.append(arith.addf(product, _load_f32(self.offset, 0)))
        return found

    def _pointers(
        self, operand: Operand, o: ir.Value, step: ir.Value | int
    ) -> list[list[ir.Value]]:
        """Where this thread's scales are, and with double quantization their nested scales."""
        block, column = (o, step) if operand.transposed else (step, o)
        k, n = (operand.o, operand.c) if operand.transposed else (operand.c, operand.o)
        block = arith.divui(_mul(block, k), _c(operand.block_size))
        column = _mul(column, n)
        nb, columns = ir.MemRefType(self.blocks.type).shape
        kind = _f32() if self.nested is None else _int(8)
        width = operand.scale_shape[1]
        found = []
        for entry in _entries(operand):
            b = _add(block, arith.divui(entry, _c(width)))
            b = arith.minui(b, _c(nb - 1))  # rows beyond K
            c = _add(column, arith.remui(entry, _c(width)))
            place = _add(_mul(b, columns), c)
            pointers = [_at(utils.memref_ptr(self.blocks), place, kind)]
            if self.nested is not None:
                index = arith.divui(_add(_mul(c, nb), b), _c(self.nested_block))
                last = ir.MemRefType(self.nested.type).shape[0] - 1
                index = arith.minui(index, _c(last))  # padded columns
                pointers.append(_at(utils.memref_ptr(self.nested), index, _i32()))
            found.append(pointers)
        return found


def aside(operand: Operand, count: int) -> tuple[int, int]:
    """Shape of the 32-bit words that the threads put aside; `count` arrays hold the scales."""
    each = max(1, math.prod(operand.scale_shape) // THREADS)
    return each * (1 if count == 1 else 2), THREADS


def fetched(operand: Operand, words: int, slot: ir.Value) -> list[ir.Value]:
    """Reads what this thread has put aside, `words` for each of its scales."""
    count = len(_entries(operand)) * words
    return [llvm.load(_i32(), _own(slot, i)) for i in range(count)]


def put_aside(values: list[ir.Value], slot: ir.Value) -> None:
    """Writes 32-bit values to shared memory, for `fetched` by the same thread; no barrier."""
    for i, value in enumerate(values):
        llvm.store(value, _own(slot, i))


def _own(slot: ir.Value, i: int) -> ir.Value:
    thread = arith.remui(utils.thread_idx(), _c(THREADS))
    return _at(utils.memref_ptr(slot), _add(thread, i * THREADS), _i32())


def store_scales(
    values: list[ir.Value], operand: Operand, scales: ir.Value, dtype: ir.Type
) -> None:
    """Rounds this thread's scales to `dtype` and stores them in shared memory; no barrier."""
    base = utils.memref_ptr(scales)
    for entry, value in zip(_entries(operand), values):
        rounded = arith.truncf(dtype, value)
        if operand.transposed:
            llvm.store(rounded, _at(base, entry, dtype))
        else:
            pair = vector.broadcast(ir.VectorType.get((2,), dtype), rounded)
            llvm.store(utils.bitcast(pair, _i32()), _at(base, entry, _i32()))


def _entries(operand: Operand) -> list[ir.Value]:
    count = math.prod(operand.scale_shape)
    thread = arith.remui(utils.thread_idx(), _c(THREADS))
    if count < THREADS:  # some are stored twice, with the same value
        return [arith.remui(thread, _c(count))]
    return [_add(thread, i * THREADS) for i in range(count // THREADS)]


def weights(
    operand: Operand,
    codes: ir.Value,
    table: ir.Value,
    scales: ir.Value,
    dtype: ir.Type,
) -> Iterator[fa.FragmentedArray]:
    """Yields the operand in `dtype`, in its instruction's layout: codebook * scale, each rounded.

    For wgmma it comes in parts of GROUP_ROWS rows, each decoded when it is asked for; else in one.
    """
    layout = operand.layout(dtype)
    packed = fa.FragmentedArray.load_tiled(
        codes, swizzle=operand.code_swizzle, layout=code_layout(operand), is_signed=False
    )
    own_scales: dict[Place, ir.Value] = {}
    pair = ir.VectorType.get((2,), dtype)

    @functools.cache
    def entry(register: Register, byte: int) -> ir.Value:
        place = _entry_offset(packed.registers[register], byte)
        return llvm.load(_i32(), _at(utils.memref_ptr(table), place, _int(8)))

    @functools.cache
    def scale(place: Place, word: int) -> ir.Value:
        if place not in own_scales:
            own_scales[place] = _at(utils.memref_ptr(scales), _value(place), _i32())
        return utils.bitcast(llvm.load(_i32(), _at(own_scales[place], word, _i32())), pair)

    def decoded(found: Found) -> ir.Value:
        halves = _permute(*(entry(*code) for code in found.codes), 0x7632 if found.high else 0x5410)
        return arith.mulf(utils.bitcast(halves, pair), scale(found.scale_place, found.scale_word))

    registers = np.empty(layout.registers_shape(operand.shape), object)
    places = plan(operand, layout)
    parts = operand.shape[0] // GROUP_ROWS if operand.form == "wgmma" else 1
    for part in np.split(np.arange(len(registers)), parts):
        for register in places:
            if register[0] in part:
                registers[register] = decoded(places[register])
        yield fa.FragmentedArray(_registers=registers[part], _layout=layout, _is_signed=None)


def product(
    operand: Operand,
    total: fa.FragmentedArray,
    left: ir.Value,
    right: Iterable[fa.FragmentedArray],
    meanwhile: Callable[[], None],
) -> fa.FragmentedArray:
    """total + left @ right, left [m, c] in swizzled shared memory, right as `weights` yields it.

    `meanwhile` writes code that runs while the tensor cores are busy. If the warps share the
    contraction, each adds its own product to its own rows of `total` [4 * SPLIT_M, o]. With wgmma
    `total` is transposed, [o, m], and the tensor cores multiply one part of `right` while the next
    is decoded.
    """
    if operand.form == "wgmma":
        columns = utils.memref_transpose(left, (1, 0, 3, 2))
        sums = []
        for i, part in enumerate(right):
            own = total[i * GROUP_ROWS : (i + 1) * GROUP_ROWS]
            sums.append(wgmma(WGMMAAccumulator.from_registers(own), part, columns, swizzle=128))
        nvvm.wgmma_commit_group_sync_aligned()
        meanwhile()
        nvvm.wgmma_wait_group_sync_aligned(0)
        registers = np.concatenate([sum_.value.registers for sum_ in sums])
        return fa.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)
    (whole,) = right
    result = _mma(operand, total, left, whole)
    meanwhile()
    return result


def _mma(
    operand: Operand, total: fa.FragmentedArray, left: ir.Value, right: fa.FragmentedArray
) -> fa.FragmentedArray:
    layout = MMALayouts(right.mlir_dtype, m_warps=operand.m_warps).lhs
    if not operand.split:
        return mma(total, fa.FragmentedArray.load_tiled(left, swizzle=128, layout=layout), right)
    # Every warp reads its own columns of the tile as rows of one larger operand.
    own = MMALayouts(right.mlir_dtype, m_warps=1).lhs
    row, c = divmod(ownership(layout, (WARPS * SPLIT_M, operand.share)), operand.share)
    same = ownership(own, (SPLIT_M, operand.share)) == row % SPLIT_M * operand.share + c
    if not same.all():
        raise AssertionError("the layouts of one and of four warps differ within a warp")
    columns = utils.memref_slice(left, (slice(None), utils.ds(_index(_warp()), 1)))
    loaded = fa.FragmentedArray.load_tiled(columns, swizzle=128, layout=own)
    rows = fa.FragmentedArray(_registers=loaded.registers, _layout=layout, _is_signed=None)
    return mma(total, rows, right)


def store(
    total: fa.FragmentedArray, out: ir.Value, m: ir.Value, o: ir.Value, dtype: ir.Type
) -> None:
    """Writes `total` [m, o] of mma to tile (m, o) of `out`, rounded to `dtype`."""
    tile = tuple(utils.ds(_index(_mul(at, size)), size) for at, size in zip((m, o), total.shape))
    total.astype(dtype).store_untiled(utils.memref_slice(out, tile), optimized=False)


def store_transposed(
    operand: Operand,
    total: fa.FragmentedArray,
    out: ir.Value,
    m: ir.Value,
    o: ir.Value,
    dtype: ir.Type,
) -> None:
    """Writes `total` [o, m] of wgmma to tile (m, o) of `out`, rounded to `dtype`."""
    rows, stride = total.shape[1], ir.MemRefType(out.type).shape[1]
    o_index, row = divmod(ownership(total.layout, total.shape), rows)
    places = row * stride + operand.output(o_index)
    tile = _add(_mul(m, rows * stride), _mul(o, operand.o))
    _scatter(total, places, _at(utils.memref_ptr(out), tile, dtype), dtype)


def _scatter(array: fa.FragmentedArray, places: np.ndarray, base: ir.Value, dtype: ir.Type) -> None:
    """Stores the elements of an array at `places` [warps, lanes, *registers, vector] after base."""
    bases: dict[Place, ir.Value] = {}
    for register in np.ndindex(places.shape[2:]):
        index = places[(slice(None), slice(None), *register)]
        place = Place.of(index - index[0, 0])
        if place not in bases:
            bases[place] = _at(base, _value(place), dtype)
        value = _extract(array.registers[register[:-1]], register[-1])
        if dtype != array.mlir_dtype:
            value = arith.truncf(dtype, value)
        llvm.store(value, _at(bases[place], int(index[0, 0]), dtype))


def sum_warps(
    operand: Operand,
    total: fa.FragmentedArray,
    scratch: ir.Value,
    out: ir.Value,
    m: ir.Value,
    o: ir.Value,
    dtype: ir.Type,
) -> None:
    """Adds up what the warps have and writes tile (m, o) of `out`, rounded to `dtype`.

    `scratch` is shared memory of at least WARPS * SPLIT_M * (operand.o + 8) words.
    """
    width = operand.o + 8  # rows that start in the same bank would be written one by one
    row, o_index = divmod(ownership(total.layout, (WARPS * SPLIT_M, operand.o)), operand.o)
    words = row * width + operand.output(o_index)
    base = utils.memref_ptr(scratch)
    _scatter(total, words, base, _f32())
    utils.warpgroup_barrier()
    each = SPLIT_M * operand.o // THREADS
    threads = operand.o // each  # of a row
    thread = arith.remui(utils.thread_idx(), _c(THREADS))
    r, column = arith.divui(thread, _c(threads)), _mul(arith.remui(thread, _c(threads)), each)
    own = _at(base, _add(_mul(r, width), column), _f32())
    kind = ir.VectorType.get((each,), _f32())
    parts = [
        llvm.load(kind, _at(own, w * SPLIT_M * width, _f32()), alignment=16) for w in range(WARPS)
    ]
    result = functools.reduce(arith.addf, parts)
    if dtype != _f32():
        result = arith.truncf(ir.VectorType.get((each,), dtype), result)
    stride = ir.MemRefType(out.type).shape[1]
    target = _add(_mul(_add(_mul(m, SPLIT_M), r), stride), _add(_mul(o, operand.o), column))
    llvm.store(result, _at(utils.memref_ptr(out), target, dtype), alignment=2 * each)


def at_most(index: ir.Value, more: int, last: int) -> ir.Value:
    """Returns index + more, or `last` if that is less."""
    return arith.minui(_add(index, more), _c(last))


def _value(place: Place) -> ir.Value:
    """Of the running thread."""
    lane = _lane()
    own = _add(_mul(arith.divui(lane, _c(4)), place.g), _mul(arith.remui(lane, _c(4)), place.t))
    step = place.warps[1]
    if place.warps == tuple(step * w for w in range(WARPS)):
        return _add(own, _mul(_warp(), step))
    warp, offset = _warp(), _c(place.warps[0])
    for w in range(1, WARPS):
        here = arith.cmpi(arith.CmpIPredicate.eq, warp, _c(w))
        offset = arith.select(here, _c(place.warps[w]), offset)
    return _add(own, offset)


def _entry_offset(register: ir.Value, byte: int) -> ir.Value:
    """Bytes from the start of the table to the running lane's copy of an entry."""
    size = ir.VectorType(register.type).shape[0]
    if size < 4:
        code = arith.extui(_i32(), _extract(register, byte))
        return _add(_mul(code, 4 * LANES), _mul(_lane(), 4))
    # a shift and a mask, where taking out the byte and multiplying it would be three operations
    words = utils.bitcast(register, ir.VectorType.get((size // 4,), _i32()))
    word, by = _extract(words, byte // 4), 8 * (byte % 4) - (4 * LANES).bit_length() + 1
    shifted = arith.shrui(word, _c(by)) if by > 0 else arith.shli(word, _c(-by))
    return arith.ori(arith.andi(shifted, _c(0xFF * 4 * LANES)), _mul(_lane(), 4))


def _permute(a: ir.Value, b: ir.Value, selector: int) -> ir.Value:
    asm = f"prmt.b32 $0, $1, $2, {selector:#x};"
    return llvm.inline_asm(_i32(), [a, b], asm, "=r,r,r", has_side_effects=False)


def _extract(register: ir.Value, position: int) -> ir.Value:
    static = ir.DenseI64ArrayAttr.get([position])
    return vector.extract(register, dynamic_position=[], static_position=static)


def _load_f32(array: ir.Value | None, index: ir.Value | int) -> ir.Value:
    return llvm.load(_f32(), _at(utils.memref_ptr(array), index, _f32()))


def _at(pointer: ir.Value, index: ir.Value | int, element: ir.Type) -> ir.Value:
    return utils.getelementptr(pointer, [index], element)


def _warp() -> ir.Value:
    thread = arith.remui(utils.thread_idx(), _c(THREADS))
    return arith.divui(thread, _c(LANES))


def _lane() -> ir.Value:
    return arith.remui(utils.thread_idx(), _c(LANES))


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def _c(value: int) -> ir.Value:
    return utils.c(value, _i32())


def _add(a: ir.Value, b: ir.Value | int) -> ir.Value:
    return arith.addi(a, _c(b) if isinstance(b, int) else b)


def _mul(a: ir.Value | int, b: int) -> ir.Value:
    return arith.muli(_c(a) if isinstance(a, int) else a, _c(b))


def _int(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)


def _i32() -> ir.Type:
    return _int(32)


def _f32() -> ir.Type:
    return ir.F32Type.get()
