"""Reads machine code (SASS): classes of instructions, loops, and a kernel's main loop."""

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
"""Class to mnemonics; the first match wins. All other mnemonics are "integer", which the ALU pipe
runs: logic, shifts, additions, moves, selects and comparisons (of floats too), conversions to 16
bits."""

INTEGER = "integer"
PRODUCTS = ("tensor", "float32", "float16")
"""Classes of products, which identify a main loop; the first class that occurs decides."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_MATCHERS = [(name, re.compile("|".join(heads))) for name, heads in CLASSES.items()]


class Launch(NamedTuple):
    """A kernel's launch: blocks of the grid, threads of a block, dynamic shared memory in bytes."""

    blocks: int
    threads: int
    shared: int


class Instruction(NamedTuple):
    """One line of SASS.

    Attributes:
      name: mnemonic with its modifiers.
      operands: text after the name.
      conditional: whether a predicate decides if it runs.
      labels: labels directly before it.
    """

    name: str
    operands: str
    conditional: bool = False
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SassKernel:
    """One kernel in machine code.

    Attributes:
      name: name of the entry function.
      target: ptxas' name of the architecture, such as sm_90a.
      registers: registers per thread.
      spill_bytes: bytes of spill stores and loads per thread.
      static_shared: bytes of shared memory in addition to `launch.shared`.
      launch: launch of the kernel; None if the compiler did not report it.
      code: all instructions.
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
        """Returns the innermost loop with products; if there are several, the one with the most.

        Products are tensor instructions or, if no loop has any, float32 or else float16
        instructions. Without such a loop, the result is (). The result includes inner loops that
        only wait, each once.
        """
        counts = {loop: histogram([self.code[i] for i in loop]) for loop in loops(self.code)}
        for kind in PRODUCTS:
            found = [loop for loop, count in counts.items() if count[kind]]
            inner = [a for a in found if not any(set(b) < set(a) for b in found)]
            if inner:
                return tuple(self.code[i] for i in max(inner, key=lambda a: counts[a][kind]))
        return ()


def parse(sass: str) -> tuple[Instruction, ...]:
    """Reads the instructions of one function from the output of nvdisasm."""
    code, labels = [], []
    for line in sass.splitlines():
        if label := re.match(r"^(\.\w+):", line):
            labels.append(label[1])
        elif match := _INSTRUCTION.match(line):
            code.append(Instruction(match[2], match[3], bool(match[1]), tuple(labels)))
            labels = []
    return tuple(code)


def launched(kernels: Iterable[SassKernel]) -> list[SassKernel]:
    """Returns the kernels whose launch the compiler reported."""
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

    A loop has a head: an instruction that dominates a later jump to it, which means that every path
    to the jump passes the head. The loop is all instructions on paths from the head to the jump.
    Jumps to the same head form one loop. A jump back alone is no loop: the slow path of a barrier
    lies behind the kernel's end and jumps back too.
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
    """Returns the nodes that can be reached from `start` along `edges`, never through `without`."""
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
      ValueError: the mnemonic has no shape.
    """
    if name.startswith("UTC"):
        return 0
    if group := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        return 2 * math.prod(map(int, group.groups())) // 4
    if shape := re.search(r"\.(16|8)(8|16)(4|8|16|32)\b", name):
        return 2 * math.prod(map(int, shape.groups()))
    raise ValueError(f"{name}: no shape in it")


def multiplies(code: Sequence[Instruction]) -> bool:
    """Returns whether the code has tensor instructions."""
    return any(classify(i.name) == "tensor" for i in code)


def tensor_flop(code: Sequence[Instruction]) -> int:
    """Returns the floating-point operations of all tensor instructions, per warp."""
    return sum(mma_flop(i.name) for i in code if classify(i.name) == "tensor")
