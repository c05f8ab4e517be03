"""Instructions that the lanes of a warp execute together: mma, shfl, vote, elect, redux."""

import numpy as np

from ptx_emulator.block import Block
from ptx_emulator.form import Form, check_whole_warps, members, together
from ptx_emulator.memory import Fault
from ptx_emulator.operands import bits_of, values_of, writer_of
from ptx_emulator.text import Group, Instruction, Program, Unsupported
from ptx_emulator.values import ATOMIC, encode, mma, shuffle

Array = np.ndarray


def mma_instruction(i: Instruction, program: Program) -> Form:
    depth = {"m16n8k16": 16, "m16n8k8": 8}[i.opcode[3]]
    type = i.opcode[7]
    if i.opcode[1:3] != ("sync", "aligned") or i.opcode[4:6] != ("row", "col"):
        raise Unsupported("form")
    if i.opcode[6:] != ("f32", type, type, "f32") or type not in ("f16", "bf16"):
        raise Unsupported("types")
    groups = [o.items for o in i.operands]  # type: ignore[union-attr]
    if [len(g) for g in groups] != [4, depth // 4, depth // 8, 4]:
        raise Unsupported("registers")
    getters = [[bits_of(o, 32) for o in group] for group in groups[1:]]
    setters = [writer_of(o, "b32", program) for o in groups[0]]

    def work(block: Block, mask: Array) -> None:
        check_whole_warps(mask)
        parts = (
            np.stack([np.broadcast_to(get(block), (block.count,)) for get in group], -1)
            for group in getters
        )
        a, b, c = (p.reshape(block.warps, 32, -1) for p in parts)
        result = mma(a, b, c, type, depth).reshape(block.count, 4)
        for column, put in enumerate(setters):
            put(block, np.ascontiguousarray(result[:, column]), mask)

    return Form(work, needed=together)


def shfl_instruction(i: Instruction, program: Program) -> Form:
    if i.opcode[1] != "sync" or i.opcode[3] != "b32":
        raise Unsupported("form")
    target = i.operands[0].items if isinstance(i.operands[0], Group) else (i.operands[0],)
    setters = [writer_of(o, t, program) for o, t in zip(target, ("b32", "pred"))]
    a, b, c = (bits_of(o, 32) for o in i.operands[1:4])

    def work(block: Block, mask: Array) -> None:
        value, operand, control = (
            np.broadcast_to(get(block), (block.count,)).reshape(-1, 32) for get in (a, b, c)
        )
        lanes, inside = shuffle(i.opcode[2], operand, control)
        present = np.take_along_axis(mask.reshape(-1, 32), lanes, -1)
        if (mask & ~present.reshape(-1)).any():
            raise Fault("takes the value of a lane that is not there")
        results = np.take_along_axis(value, lanes, -1), inside
        for put, result in zip(setters, results):
            put(block, result.reshape(-1), mask)

    return Form(work, needed=members(i.operands[4]))


def vote_instruction(i: Instruction, program: Program) -> Form:
    mode = i.opcode[2]
    source = bits_of(i.operands[1], 1)
    put = writer_of(i.operands[0], i.opcode[-1], program)

    def work(block: Block, mask: Array) -> None:
        flags = np.broadcast_to(source(block), (block.count,)) & mask
        lanes, there = flags.reshape(-1, 32), mask.reshape(-1, 32)
        if mode == "ballot":
            bits = (lanes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
            put(block, np.repeat(bits.astype(np.uint32), 32), mask)
            return
        every, some = (lanes | ~there).all(-1), lanes.any(-1)
        value = {"all": every, "any": some, "uni": every | ~some}[mode]
        put(block, np.repeat(value, 32), mask)

    return Form(work, needed=members(i.operands[2]))


def activemask(i: Instruction, program: Program) -> Form:
    put = writer_of(i.operands[0], "b32", program)

    def work(block: Block, mask: Array) -> None:
        lanes = mask.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
        put(block, np.repeat(lanes.sum(-1).astype(np.uint32), 32), mask)

    return Form(work)


def elect(i: Instruction, program: Program) -> Form:
    leader, chosen = i.operands[0].items  # type: ignore[union-attr]
    setters = writer_of(leader, "b32", program), writer_of(chosen, "pred", program)

    def work(block: Block, mask: Array) -> None:
        first = np.repeat(mask.reshape(-1, 32).argmax(-1), 32)
        setters[0](block, first.astype(np.uint32), mask)
        setters[1](block, block.threads % 32 == first, mask)

    return Form(work, needed=members(i.operands[1]))


def redux(i: Instruction, program: Program) -> Form:
    type = i.opcode[-1]
    combine = ATOMIC[i.opcode[2]]
    get, put = values_of(i.operands[1], type), writer_of(i.operands[0], type, program)

    def work(block: Block, mask: Array) -> None:
        values = np.broadcast_to(get(block), (block.count,)).copy()
        for warp in range(block.warps):
            lanes = np.flatnonzero(mask[warp * 32 :][:32]) + warp * 32
            if len(lanes):
                total = values[lanes[:1]]
                for lane in lanes[1:]:
                    total = combine(total, values[lane : lane + 1])
                values[lanes] = total
        put(block, encode(values, type), mask)

    return Form(work, needed=members(i.operands[2]))
