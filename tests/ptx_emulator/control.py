"""Instructions that control threads: branches, returns, barriers, traps."""

import numpy as np

from ptx_emulator.block import Block, Deadlock
from ptx_emulator.form import Form, members, together
from ptx_emulator.memory import Fault
from ptx_emulator.operands import bits_of
from ptx_emulator.text import Instruction, Program, Unsupported

Array = np.ndarray


def bra(i: Instruction, program: Program) -> Form:
    target = program.labels[i.operands[0].name]  # type: ignore[union-attr]
    return Form(control=lambda block, pc, mask: [(target, mask)])


def ret(i: Instruction, program: Program) -> Form:
    def leave(block: Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
        block.alive = block.alive & ~mask
        return []

    return Form(control=leave)


def bar_instruction(i: Instruction, program: Program) -> Form:
    words = [w for w in i.opcode[1:] if w != "cta"]
    if words[0] == "warp":

        def sync(block: Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
            for warp in np.unique(block.threads[mask] // 32):
                block.clocks.leave(warp)
            return [(pc + 1, mask)]

        return Form(control=sync, needed=members(i.operands[0]))
    if words[0] not in ("sync", "arrive"):
        raise Unsupported("form")
    getters = [bits_of(o, 32) for o in i.operands]
    aligned = i.opcode[0] == "bar" or "aligned" in words

    def arrive(block: Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
        values = [np.broadcast_to(get(block), (block.count,)) for get in getters]
        out: list[tuple[int, Array]] = []
        for barrier in np.unique(values[0][mask]):
            some = mask & (values[0] == barrier)
            counts = np.unique(values[1][some]) if len(values) > 1 else [None]
            if len(counts) > 1:
                raise Deadlock(f"barrier {barrier} is entered in two ways at once")
            expected = None if counts[0] is None else int(counts[0])
            out += block.arrive(int(barrier), expected, pc + 1, some, words[0] == "sync")
        return out

    return Form(control=arrive, needed=together if aligned else None)


def trap(i: Instruction, program: Program) -> Form:
    def stop(block: Block, mask: Array) -> None:
        raise Fault(f"{i.opcode[0]} by thread {np.flatnonzero(mask)[0]}")

    return Form(stop)


def no_effect(i: Instruction, program: Program) -> Form:
    return Form(lambda block, mask: None)
