"""Reads machine code (SASS): what its instructions do, its loops, and a kernel's main loop."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

CLASSES: Mapping[str, tuple[str, ...]] = {
    "tensor": (r"[A-Z]*MMA",),
    "shared": ("LDS", "LDSM", "STS", "STSM", "ATOMS", "SHFL", "MOVM"),
    "global": ("LD", "LDG", "LDGSTS", "ST", "STG", "RED", "ATOM", "ATOMG", "UTMA.*", "UBLK.*"),
    "local": ("LDL", "STL"),
    "float32": ("FADD", "FFMA", "FMUL"),
    "float16": ("HADD2", "HFMA2", "HMUL2", "HMNMX2", "HSET2", "HSETP2"),
    "multiply": ("IMAD", "IMUL", "IDP"),
    "convert": ("I2F", "F2I", "F2F", "I2I", "MUFU", "FRND", "POPC", "FLO", "BREV"),
    "control": (
        *("BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "NOP", "YIELD"),
        *(
            "WARPSYNC",
            "BAR",
            "DEPBAR",
            "LDGDEPBAR",
            "ARRIVES",
            "SYNCS",
            "MEMBAR",
            "ERRBAR",
            "FENCE",
        ),
        *("CCTL", "WARPGROUP", "ELECT", "NANOSLEEP", "BMOV", "ACQBULK", "USETMAXREG", "VOTE"),
    ),
    "uniform": ("U[A-Z0-9]*", "R2UR", "S2UR", "LDCU", "LDC", "S2R", "CS2R"),
}
"""Class to mnemonics, first match wins; all others are "integer": logic, shifts, additions, moves,
selects and comparisons (of floats as well), conversions to 16 bits: what the ALU pipe takes."""

INTEGER = "integer"
PRODUCTS = ("tensor", "float32", "float16")
"""Classes that a main loop is known by."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_MATCHERS = [(name, re.compile("|".join(heads))) for name, heads in CLASSES.items()]


class Launch(NamedTuple):
    """How often a kernel runs: blocks of the grid, threads of a block, bytes of dynamic shared
    memory."""

    blocks: int
    threads: int
    shared: int


class Instruction(NamedTuple):
    """One line of SASS.

    Attributes:
      name: mnemonic with its modifiers.
      operands: the rest.
      conditional: whether a predicate decides.
      labels: before it.
    """

    name: str
    operands: str
    conditional: bool = False
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SassKernel:
    """One kernel as the GPU would get it.

    Attributes:
      name: of the entry function.
      target: ptxas' name of the architecture, such as sm_90a.
      registers: per thread.
      spill_bytes: per thread, stores and loads.
      static_shared: bytes of shared memory beside `launch.shared`.
      launch: None where the compiler did not say.
      code: all of its instructions.
    """

    name: str
    target: str
    registers: int
    spill_bytes: int
    static_shared: int
    launch: Launch | None
    code: tuple[Instruction, ...]

    @property
    def shared(self) -> int:
        """Returns the bytes of shared memory per block."""
        return self.static_shared + (self.launch.shared if self.launch else 0)

    def main_loop(self) -> tuple[Instruction, ...]:
        """Returns the innermost loop that multiplies, the most of such if several.

        Products are tensor instructions, else float32 or float16 ones; without any it is (). A
        loop inside that waits counts once.
        """
        counts = {loop: histogram([self.code[i] for i in loop]) for loop in loops(self.code)}
        for kind in PRODUCTS:
            found = [loop for loop, count in counts.items() if count[kind]]
            inner = [a for a in found if not any(set(b) < set(a) for b in found)]
            if inner:
                return tuple(self.code[i] for i in max(inner, key=lambda a: counts[a][kind]))
        return ()


def parse(sass: str) -> tuple[Instruction, ...]:
    """Reads the instructions of one function, as nvdisasm prints it."""
    code, labels = [], []
    for line in sass.splitlines():
        if label := re.match(r"^(\.\w+):", line):
            labels.append(label[1])
        elif match := _INSTRUCTION.match(line):
            code.append(Instruction(match[2], match[3], bool(match[1]), tuple(labels)))
            labels = []
    return tuple(code)


def launched(kernels: Iterable[SassKernel]) -> list[SassKernel]:
    """Returns the kernels whose launch the compiler told."""
    return [kernel for kernel in kernels if kernel.launch is not None]


def classify(name: str) -> str:
    """Returns the class of a mnemonic: a key of `CLASSES`, or "integer"."""
    head = name.partition(".")[0]
    return next((kind for kind, heads in _MATCHERS if heads.fullmatch(head)), INTEGER)


def histogram(code: Sequence[Instruction]) -> collections.Counter[str]:
    """Counts instructions by class."""
    return collections.Counter(classify(i.name) for i in code)


def loops(code: Sequence[Instruction]) -> list[tuple[int, ...]]:
    """Returns the natural loops, each as the positions of its instructions in order.

    A loop is a jump to an instruction that every way to the jump leads through, with all that lies
    on a way from there to the jump; jumps to one instruction are one loop. (A jump back alone is
    none: the slow way round a barrier lies behind the kernel's end and jumps back as well.)
    """
    after = _successors(code)
    before: dict[int, set[int]] = collections.defaultdict(set)
    for i, targets in enumerate(after):
        for target in targets:
            before[target].add(i)
    reached = _reach(0, after)
    bodies: dict[int, set[int]] = {}
    for jump in sorted(reached):
        for head in after[jump]:
            if head < jump and jump not in _reach(0, after, without=head):
                body = _reach(jump, before, without=head) | {head}
                bodies[head] = bodies.get(head, set()) | body
    return [tuple(sorted(body)) for body in bodies.values()]


def _successors(code: Sequence[Instruction]) -> list[tuple[int, ...]]:
    places = {label: i for i, x in enumerate(code) for label in x.labels}
    found = []
    for i, x in enumerate(code):
        target = re.search(r"`\(([^)]+)\)", x.operands)
        jumps = x.name.startswith("BRA") and target is not None
        # `BRA UP0, label` has its condition among the operands
        always = not x.conditional and not (jumps and "," in x.operands)
        ends = always and (jumps or x.name.startswith(("EXIT", "RET", "BRX", "JMP")))
        following = () if ends or i + 1 == len(code) else (i + 1,)
        there = (places[target[1]],) if jumps and target and target[1] in places else ()
        found.append((*following, *there))
    return found


def _reach(start: int, edges: Any, without: int | None = None) -> set[int]:
    """Returns what can be reached from `start` along `edges`, never through `without`."""
    seen: set[int] = set()
    rest = [] if start == without else [start]
    while rest:
        i = rest.pop()
        if i not in seen:
            seen.add(i)
            rest += [j for j in edges[i] if j != without]
    return seen


def mma_flop(name: str) -> int:
    """Returns the floating-point operations that one tensor instruction does per warp.

    Source: the shape in the mnemonic, m n k: HMMA.16816 is a warp's 16 x 8 x 16; HGMMA.64x128x16 is
    shared by the four warps of a warpgroup. tcgen05 (UTCHMMA) has its shape in a descriptor: 0.

    Raises:
      ValueError: a mnemonic without a shape.
    """
    if name.startswith("UTC"):
        return 0
    if group := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        return 2 * math.prod(map(int, group.groups())) // 4
    if shape := re.search(r"\.(16|8)(8|16)(4|8|16|32)\b", name):
        return 2 * math.prod(map(int, shape.groups()))
    raise ValueError(f"{name}: no shape in it")


def multiplies(code: Sequence[Instruction]) -> bool:
    """Tells whether tensor instructions are among them."""
    return any(classify(i.name) == "tensor" for i in code)


def tensor_flop(code: Sequence[Instruction]) -> int:
    """Adds up the floating-point operations of the tensor instructions, per warp."""
    return sum(mma_flop(i.name) for i in code if classify(i.name) == "tensor")
