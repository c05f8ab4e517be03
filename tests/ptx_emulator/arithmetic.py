"""Instructions that compute on registers: arithmetic, bits, comparisons, conversions."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ptx_emulator.block import WINDOWS, Block
from ptx_emulator.form import Form
from ptx_emulator.operands import bits_of, space_of, values_of, writer_of
from ptx_emulator.text import Group, Instruction, Number, Program, Unsupported
from ptx_emulator.values import (
    COMPARISONS,
    COUNTS,
    FLOATS,
    PAIRS,
    SAME,
    SHIFTS,
    convert,
    decode,
    encode,
    extract,
    flush,
    funnel,
    insert,
    lop3,
    prmt,
    saturate,
    wide,
    width,
)

Array = np.ndarray


def same_type(instruction: Instruction, program: Program) -> Form:
    name, type, mods = instruction.opcode[0], instruction.opcode[-1], instruction.opcode[1:-1]
    arity, operation = SAME[name]
    if name in ("div", "rcp", "sqrt") and "approx" in mods:
        mods = tuple(m for m in mods if m != "approx")
    if "cc" in mods or len(instruction.operands) != arity + 1:
        raise Unsupported("form")
    result = wide(type) if "wide" in mods else type
    types = [type, type, result][:arity]
    sources = [values_of(o, t) for o, t in zip(instruction.operands[1:], types)]
    put = writer_of(instruction.operands[0], result, program)
    mode = next((m for m in mods if m in ("rz", "rm", "rp")), "rn")
    floats = PAIRS.get(type, type) in FLOATS
    flushes, saturates = floats and "ftz" in mods, "sat" in mods
    if saturates and not floats:
        raise Unsupported("integer saturation")

    def work(block: Block, mask: Array) -> None:
        values = [get(block) for get in sources]
        if flushes:
            values = [flush(v, type) for v in values]
        value = operation(type, mods, *values)
        if saturates:
            value = saturate(value)
        bits = encode(value, result, mode)
        if flushes:
            bits = encode(flush(decode(bits, type), type), type)
        put(block, bits, mask)

    return Form(work)


def pure(
    instruction: Instruction,
    program: Program,
    result: str,
    types: Sequence[str],
    operation: Callable[..., Array],
) -> Form:
    """Returns the form of an instruction whose result depends on its operands alone.

    Args:
      instruction: instruction with one target and `len(types)` operands.
      program: kernel that holds the instruction.
      result: type of the target.
      types: types of the operands.
      operation: function from the operands' values to the bits of the result.
    """
    if len(instruction.operands) != len(types) + 1:
        raise Unsupported("form")
    sources = [values_of(o, t) for o, t in zip(instruction.operands[1:], types)]
    put = writer_of(instruction.operands[0], result, program)

    def work(block: Block, mask: Array) -> None:
        put(block, operation(*(get(block) for get in sources)), mask)

    return Form(work)


def count_instruction(i: Instruction, program: Program) -> Form:
    type = i.opcode[-1]
    return pure(i, program, "u32", [type], lambda a: COUNTS[i.opcode[0]](type, (), a))


def shift_instruction(i: Instruction, program: Program) -> Form:
    type = i.opcode[-1]
    operation = SHIFTS[i.opcode[0]]
    return pure(
        i, program, type, [type, "u32"], lambda a, n: encode(operation(type, (), a, n), type)
    )


def lop3_instruction(i: Instruction, program: Program) -> Form:
    table = i.operands[4]
    if i.opcode != ("lop3", "b32") or not isinstance(table, Number):
        raise Unsupported("form")
    short = dataclasses.replace(i, operands=i.operands[:4])
    return pure(short, program, "b32", ["b32"] * 3, lambda a, b, c: lop3(a, b, c, table.value))


def prmt_instruction(i: Instruction, program: Program) -> Form:
    if i.opcode != ("prmt", "b32"):
        raise Unsupported("mode")
    return pure(i, program, "b32", ["b32"] * 3, prmt)


def bfe(i: Instruction, program: Program) -> Form:
    type = i.opcode[-1]
    return pure(i, program, type, [type, "u32", "u32"], lambda *x: extract(type, *x))


def bfi(i: Instruction, program: Program) -> Form:
    type = i.opcode[-1]
    return pure(i, program, type, [type, type, "u32", "u32"], lambda *x: insert(type, *x))


def shf(i: Instruction, program: Program) -> Form:
    return pure(i, program, "b32", ["b32"] * 2 + ["u32"], lambda a, b, n: funnel(a, b, n, i.opcode))


def selp(i: Instruction, program: Program) -> Form:
    type = f"b{width(i.opcode[-1])}"
    return pure(i, program, type, [type, type, "pred"], lambda a, b, c: np.where(c, a, b))


def mov(i: Instruction, program: Program) -> Form:
    bits = width(i.opcode[-1])
    type = "pred" if bits == 1 else f"b{bits}"
    get, put = bits_of(i.operands[1], bits), writer_of(i.operands[0], type, program)

    def work(block: Block, mask: Array) -> None:
        put(block, np.broadcast_to(get(block), (block.count,)), mask)

    return Form(work)


def cvt(i: Instruction, program: Program) -> Form:
    to, source, mods = i.opcode[-2], i.opcode[-1], i.opcode[1:-2]
    if "pack" in mods:
        raise Unsupported("pack")
    if to in PAIRS and source == "f32":

        def pair(high: Array, low: Array) -> Array:
            halves = [convert(v, source, PAIRS[to], mods) for v in (low, high)]
            return np.ascontiguousarray(np.stack(halves, -1)).view(np.uint32)[..., 0]

        return pure(i, program, to, [source] * 2, pair)
    return pure(i, program, to, [source], lambda v: convert(v, source, to, mods))


def setp(i: Instruction, program: Program) -> Form:
    type, mods = i.opcode[-1], i.opcode[2:-1]
    compare = COMPARISONS[i.opcode[1]]
    combine = next((m for m in mods if m in ("and", "or", "xor")), None)
    a, b = (values_of(o, type) for o in i.operands[1:3])
    third = bits_of(i.operands[3], 1) if combine else None
    targets = i.operands[0].items if isinstance(i.operands[0], Group) else (i.operands[0],)
    setters = [writer_of(t, "pred", program) for t in targets]
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

    def work(block: Block, mask: Array) -> None:
        x, y = a(block), b(block)
        if "ftz" in mods:
            x, y = flush(x, type), flush(y, type)
        holds = compare(x, y)
        for put, value in zip(setters, (holds, ~holds)):
            put(block, join[combine](value, third(block)) if combine and third else value, mask)

    return Form(work)


def set_instruction(i: Instruction, program: Program) -> Form:
    compare, to, type = COMPARISONS[i.opcode[1]], i.opcode[-2], i.opcode[-1]

    def operation(a: Array, b: Array) -> Array:
        one = np.where(compare(a, b), 1.0 if to in FLOATS else -1, 0)
        return encode(one, to)

    return pure(i, program, to, [type] * 2, operation)


def cvta(i: Instruction, program: Program) -> Form:
    window = np.uint64(WINDOWS[space_of(i.opcode)])
    down = i.opcode[1] == "to"
    return pure(
        i, program, "u64", ["u64"], lambda a: np.asarray(a - window if down else a + window)
    )
