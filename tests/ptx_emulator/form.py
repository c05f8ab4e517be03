"""Effect of an instruction on a block, and the threads that may execute it together."""

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
    """Execution of an instruction; exactly one of `work` and `control` is set.

    Attributes:
      work: function that changes the block for the threads of a mask.
      control: function from the program counter and its threads to the next program counters, each
        with its threads; None if all threads continue with the next instruction.
      needed: function that returns the threads that may execute the instruction now, if a warp
        executes it together; None if any threads may.
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
