"""The machine code of kernels compiled for a GPU that is not here: registers, spills, main loop.

XLA and Mosaic GPU leave their PTX in a folder (`dump_flags`, `dumping`); `ptxas` and `nvdisasm` of
the CUDA compiler turn it into what the GPU would run. Nothing here runs on a GPU.
"""

import collections
import contextlib
import dataclasses
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.runtime.errors import UserError

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
class Kernel:
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
        """Bytes of shared memory per block."""
        return self.static_shared + (self.launch.shared if self.launch else 0)

    def main_loop(self) -> tuple[Instruction, ...]:
        """The instructions of the innermost loop that multiplies, the most of such if several.

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


def classify(name: str) -> str:
    """The class of a mnemonic: a key of `CLASSES`, or "integer"."""
    head = name.partition(".")[0]
    return next((kind for kind, heads in _MATCHERS if heads.fullmatch(head)), INTEGER)


def histogram(code: Sequence[Instruction]) -> collections.Counter[str]:
    """Instructions by class."""
    return collections.Counter(classify(i.name) for i in code)


def loops(code: Sequence[Instruction]) -> list[tuple[int, ...]]:
    """The natural loops, each as the positions of its instructions in order.

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
    """What can be reached from `start` along `edges`, never through `without`."""
    seen: set[int] = set()
    rest = [] if start == without else [start]
    while rest:
        i = rest.pop()
        if i not in seen:
            seen.add(i)
            rest += [j for j in edges[i] if j != without]
    return seen


def mma_flop(name: str) -> int:
    """Floating-point operations that one tensor instruction does per warp.

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
    """Whether tensor instructions are among them."""
    return any(classify(i.name) == "tensor" for i in code)


def tensor_flop(code: Sequence[Instruction]) -> int:
    """Floating-point operations of the tensor instructions, per warp."""
    return sum(mma_flop(i.name) for i in code if classify(i.name) == "tensor")


@contextlib.contextmanager
def dumping(folder: Path) -> Iterator[dict[str, str | bool]]:
    """Compilations within leave PTX and launches in `folder`; yields XLA's options for that."""
    # Mosaic GPU reads the environment whenever it compiles; with a folder it dumps all it has.
    before = os.environ.get("MOSAIC_GPU_DUMP_TO")
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    try:
        yield {"xla_dump_to": str(folder), "xla_dump_emitter_re": ".*"}
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]
        if before is not None:
            os.environ["MOSAIC_GPU_DUMP_TO"] = before


def kernels(folder: Path) -> list[Kernel]:
    """All kernels whose PTX is in `folder`, assembled and disassembled.

    Raises:
      UserError: the CUDA compiler's programs are not installed.
      subprocess.CalledProcessError: ptxas or nvdisasm refuse the code.
    """
    launches = _launches(folder)
    found = []
    for ptx in sorted(folder.glob("*.ptx")):
        text = ptx.read_text("utf-8")
        if ".entry" in text:
            found += _assemble(ptx, text, launches)
    return found


def program(name: str) -> str:
    """Path of one of the CUDA compiler's programs: pip's, else the system's.

    Raises:
      UserError: it is not installed.
    """
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob(f"cu*/bin/{name}"), reverse=True):
            return str(path)
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise UserError(f"{name} is not installed: make gpu-check")
    return found


def _assemble(ptx: Path, text: str, launches: Mapping[str, Launch]) -> list[Kernel]:
    target = re.search(r"^\.target (\w+)", text, re.M)[1]  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        log = _run("ptxas", "-v", f"-arch={target}", str(ptx), "-o", str(cubin))
        sass = _run("nvdisasm", "-c", str(cubin))
    reports = _by_name(log, r"Compiling entry function '([^']+)'")
    codes = _by_name(sass, r"^\.text\.(\S+):")

    def figure(report: str, pattern: str) -> int:
        return sum(map(int, re.findall(pattern, report)))

    return [
        Kernel(
            name=name,
            target=target,
            registers=figure(report, r"Used (\d+) registers"),
            spill_bytes=figure(report, r"(\d+) bytes spill"),
            static_shared=figure(report, r"(\d+) bytes smem"),
            launch=launches.get(name),
            code=parse(codes[name]),
        )
        for name, report in reports.items()
    ]


def parse(sass: str) -> tuple[Instruction, ...]:
    """The instructions of one function, as nvdisasm prints it."""
    code, labels = [], []
    for line in sass.splitlines():
        if label := re.match(r"^(\.\w+):", line):
            labels.append(label[1])
        elif match := _INSTRUCTION.match(line):
            code.append(Instruction(match[2], match[3], bool(match[1]), tuple(labels)))
            labels = []
    return tuple(code)


def _by_name(text: str, heading: str) -> dict[str, str]:
    parts = re.split(heading, text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([program(name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _launches(folder: Path) -> dict[str, Launch]:
    found = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        pattern = r"(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)"
        for name, grid, threads, shared in re.findall(pattern, path.read_text("utf-8")):
            found[name] = Launch(_product(grid), _product(threads), int(shared))
    for path in folder.glob("*.mlir-passes.log"):
        ptx = path.with_name(path.name.removesuffix(".mlir-passes.log") + ".ptx")
        launch = _mosaic_launch(path)
        if launch is not None and ptx.exists():
            for name in re.findall(r"\.entry (\w+)", ptx.read_text("utf-8")):
                found[name] = launch
    return found


def _mosaic_launch(log: Path) -> Launch | None:
    # A constant's name holds its value once the module has been canonicalized: %c128, %c32768_i32.
    size = r"%c(\d+)(?:_\w+)?"
    sizes = rf"in \(%\w+ = {size}, %\w+ = {size}, %\w+ = {size}\)"
    pattern = rf"gpu\.launch .*? {sizes} .*? {sizes} dynamic_shared_memory_size {size}"
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            if "gpu.launch " in line and (match := re.search(pattern, line)):
                numbers = list(map(int, match.groups()))
                return Launch(math.prod(numbers[:3]), math.prod(numbers[3:6]), numbers[6])
    return None


def _product(numbers: str) -> int:
    return math.prod(map(int, numbers.split(",")))
