"""Device code of the Mosaic GPU kernels: decodes codes and computes the tensor cores' sums.

A weight is decoded in three steps. A byte of codes selects an entry of a table of pairs of codebook
values in shared memory. Two entries give two registers of the operand. The registers are multiplied
by the block's scale. Each lane has its own copy of the table in its own memory bank, so look-ups
never conflict. `operand.py` says which thread holds which element.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.mma import MMALayouts, mma
from jax.experimental.mosaic.gpu.wgmma import WGMMAAccumulator, wgmma
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from qlora_jax.kernels.mosaic.instructions import (
    add,
    address,
    as_index,
    constant,
    extract,
    f32,
    i32,
    index_of,
    integer,
    lane_id,
    mul,
    part_of,
    permute,
    warp_id,
)
from qlora_jax.kernels.mosaic.operand import (
    LANES,
    SPLIT_M,
    WARPS,
    Operand,
    Register,
    RegisterSource,
    ThreadIndex,
    code_layout,
    ownership,
    register_sources,
)

GROUP_ROWS = 64
"""Rows of the left operand of one `wgmma`."""
TABLE = (256, LANES)
"""Shape of the table of pairs, 32-bit words; entry b holds (codebook[b & 15], codebook[b >> 4])."""


def fill_table(table: ir.Value, codebooks: ir.Value, layer: ir.Value, dtype: ir.Type) -> None:
    """Writes the table of pairs in `dtype` from a layer's float32[16] codebook; no barrier."""
    warp, lane = warp_id(), lane_id()
    values = part_of(codebooks, layer, f32())

    def bits(index: ir.Value | int) -> ir.Value:
        rounded = arith.truncf(dtype, llvm.load(f32(), address(values, index, f32())))
        return arith.extui(i32(), utils.bitcast(rounded, integer(16)))

    share = TABLE[0] // WARPS
    words = address(utils.memref_ptr(table), add(mul(warp, share * LANES), lane), i32())
    low = [bits(i) for i in range(16)]
    for i in range(share // 16):
        high = arith.shli(bits(add(mul(warp, share // 16), i)), constant(16))
        for j in range(16):
            llvm.store(arith.ori(high, low[j]), address(words, (i * 16 + j) * LANES, i32()))


def weights(
    operand: Operand,
    codes: ir.Value,
    table: ir.Value,
    scales: ir.Value,
    dtype: ir.Type,
) -> Iterator[fa.FragmentedArray]:
    """Yields the decoded operand codebook[code] * scale, in the layout of its instruction.

    Codebook, scale and product are each rounded to `dtype`. For the form "wgmma" the operand comes
    in parts of GROUP_ROWS rows, and each part is decoded when the caller takes it; the other forms
    have one part.
    """
    layout = operand.layout(dtype)
    packed = fa.FragmentedArray.load_tiled(
        codes, swizzle=operand.code_swizzle, layout=code_layout(operand), is_signed=False
    )
    own_scales: dict[ThreadIndex, ir.Value] = {}
    pair = ir.VectorType.get((2,), dtype)

    @functools.cache
    def entry(register: Register, byte: int) -> ir.Value:
        place = _entry_offset(packed.registers[register], byte)
        return llvm.load(i32(), address(utils.memref_ptr(table), place, integer(8)))

    @functools.cache
    def scale(place: ThreadIndex, word: int) -> ir.Value:
        if place not in own_scales:
            own_scales[place] = address(utils.memref_ptr(scales), index_of(place), i32())
        return utils.bitcast(llvm.load(i32(), address(own_scales[place], word, i32())), pair)

    def decoded(found: RegisterSource) -> ir.Value:
        halves = permute(*(entry(*code) for code in found.codes), 0x7632 if found.high else 0x5410)
        return arith.mulf(utils.bitcast(halves, pair), scale(found.scale_place, found.scale_word))

    registers = np.empty(layout.registers_shape(operand.shape), object)
    places = register_sources(operand, layout)
    parts = operand.shape[0] // GROUP_ROWS if operand.form == "wgmma" else 1
    for part in np.split(np.arange(len(registers)), parts):
        for register in places:
            if register[0] in part:
                registers[register] = decoded(places[register])
        yield fa.FragmentedArray(_registers=registers[part], _layout=layout, _is_signed=None)


def _entry_offset(register: ir.Value, byte: int) -> ir.Value:
    """Returns the offset in bytes of the running lane's copy of a table entry."""
    size = ir.VectorType(register.type).shape[0]
    if size < 4:
        code = arith.extui(i32(), extract(register, byte))
        return add(mul(code, 4 * LANES), mul(lane_id(), 4))
    # A shift and a mask are two operations; extracting and multiplying the byte would be three.
    words = utils.bitcast(register, ir.VectorType.get((size // 4,), i32()))
    word, by = extract(words, byte // 4), 8 * (byte % 4) - (4 * LANES).bit_length() + 1
    shifted = arith.shrui(word, constant(by)) if by > 0 else arith.shli(word, constant(-by))
    return arith.ori(arith.andi(shifted, constant(0xFF * 4 * LANES)), mul(lane_id(), 4))


def product(
    operand: Operand,
    total: fa.FragmentedArray,
    left: ir.Value,
    right: Iterable[fa.FragmentedArray],
    meanwhile: Callable[[], None],
) -> fa.FragmentedArray:
    """Returns total + left @ right.

    In the form "split" each warp adds its product to its own rows of `total` [4 * SPLIT_M, o]. In
    the form "wgmma" `total` is transposed, [o, m], and the tensor cores multiply one part of
    `right` while the next part is decoded.

    Args:
      operand: description of `right`.
      total: sums so far.
      left: left operand [m, c] in swizzled shared memory.
      right: parts of the decoded operand, from `weights`.
      meanwhile: function that emits code to run while the tensor cores are busy.
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
    # Each warp reads its own columns of the tile, as its own rows of one larger left operand.
    own = MMALayouts(right.mlir_dtype, m_warps=1).lhs
    row, c = divmod(ownership(layout, (WARPS * SPLIT_M, operand.share)), operand.share)
    same = ownership(own, (SPLIT_M, operand.share)) == row % SPLIT_M * operand.share + c
    if not same.all():
        raise AssertionError("the layouts of one and of four warps differ within a warp")
    columns = utils.memref_slice(left, (slice(None), utils.ds(as_index(warp_id()), 1)))
    loaded = fa.FragmentedArray.load_tiled(columns, swizzle=128, layout=own)
    rows = fa.FragmentedArray(_registers=loaded.registers, _layout=layout, _is_signed=None)
    return mma(total, rows, right)
