"""What an instruction does to a block, and which threads may execute it together."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ptx_emulator.block import Block
from ptx_emulator.memory import Fault
from ptx_emulator.operands import bits_of
from ptx_emulator.text import Instruction, Operand

Array = np.ndarray

Work = Callable[[Block, Array], None]


@dataclasses.dataclass
class Form:
    """How an instruction runs.

    Attributes:
      work: for all but control.
      control: from the program counter and the threads there to the threads at each next one.
      needed: threads that may go on, for instructions that a warp executes together.
    """

    work: Work | None = None
    control: Callable[[Block, int, Array], list[tuple[int, Array]]] | None = None
    needed: Callable[[Block, Array], Array] | None = None


class Step:
    def __init__(self, instruction: Instruction, form: Form) -> None:
        self.instruction, self.form, self.needed = instruction, form, form.needed
        self.guard = None if instruction.guard is None else bits_of(instruction.guard, 1)

    def run(self, block: Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
        chosen = mask if self.guard is None else mask & self.guard(block)
        skipped = [] if self.guard is None else [(pc + 1, mask & ~chosen)]
        if not chosen.any():
            return skipped
        if self.form.control:
            return self.form.control(block, pc, chosen) + skipped
        assert self.form.work
        self.form.work(block, chosen)
        return [(pc + 1, mask)]


def together(block: Block, mask: Array) -> Array:
    return block.whole_warps(mask)


def members(operand: Operand) -> Callable[[Block, Array], Array]:
    get = bits_of(operand, 32)

    def needed(block: Block, mask: Array) -> Array:
        members = np.broadcast_to(get(block), (block.count,)).reshape(-1, 32, 1)
        wanted = members >> np.arange(32, dtype=np.uint32) & np.uint32(1) != 0
        present = (mask | ~block.alive).reshape(-1, 1, 32)
        return (present | ~wanted).all(-1).reshape(-1)

    return needed


def check_whole_warps(mask: Array) -> None:
    lanes = mask.reshape(-1, 32)
    if (lanes.any(-1) != lanes.all(-1)).any():
        raise Fault("not by all lanes of a warp")
