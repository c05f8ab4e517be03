"""The table of instructions that the emulator knows."""

from collections.abc import Callable

from ptx_emulator.arithmetic import (
    bfe,
    bfi,
    count_instruction,
    cvt,
    cvta,
    lop3_instruction,
    mov,
    prmt_instruction,
    same_type,
    selp,
    set_instruction,
    setp,
    shf,
    shift_instruction,
)
from ptx_emulator.control import bar_instruction, bra, no_effect, ret, trap
from ptx_emulator.form import Form
from ptx_emulator.memory_instructions import (
    atom_instruction,
    cp_instruction,
    ld_instruction,
    ldmatrix_stmatrix,
    param_instruction,
    st_instruction,
)
from ptx_emulator.text import Instruction, Program, Unsupported
from ptx_emulator.values import COUNTS, SAME, SHIFTS
from ptx_emulator.warp import (
    activemask,
    elect,
    mma_instruction,
    redux,
    shfl_instruction,
    vote_instruction,
)


def form_of(instruction: Instruction, program: Program) -> Form:
    """Returns the form of an instruction.

    Args:
      instruction: instruction to run.
      program: kernel that holds the instruction.

    Raises:
      Unsupported: the emulator does not know the instruction; the message holds its text.
    """
    make = MAKERS.get(instruction.opcode[0])
    try:
        if make is None:
            raise Unsupported("no such instruction here")
        return make(instruction, program)
    except (Unsupported, KeyError, ValueError, IndexError) as error:
        raise Unsupported(f"{instruction.text}: {error}") from None


MAKERS: dict[str, Callable[[Instruction, Program], Form]] = {
    **dict.fromkeys(SAME, same_type),
    **dict.fromkeys(COUNTS, count_instruction),
    **dict.fromkeys(SHIFTS, shift_instruction),
    **dict.fromkeys(("ret", "exit"), ret),
    **dict.fromkeys(("bar", "barrier"), bar_instruction),
    **dict.fromkeys(("ldmatrix", "stmatrix"), ldmatrix_stmatrix),
    **dict.fromkeys(("atom", "red"), atom_instruction),
    **dict.fromkeys(("trap", "brkpt"), trap),
    **dict.fromkeys(
        ("membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "discard"),
        no_effect,
    ),
    "lop3": lop3_instruction,
    "prmt": prmt_instruction,
    "bfe": bfe,
    "bfi": bfi,
    "shf": shf,
    "selp": selp,
    "mov": mov,
    "cvt": cvt,
    "setp": setp,
    "set": set_instruction,
    "cvta": cvta,
    "ld": ld_instruction,
    "ldu": ld_instruction,
    "st": st_instruction,
    "param": param_instruction,
    "cp": cp_instruction,
    "mma": mma_instruction,
    "shfl": shfl_instruction,
    "vote": vote_instruction,
    "activemask": activemask,
    "elect": elect,
    "redux": redux,
    "bra": bra,
}
