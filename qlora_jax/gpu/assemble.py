"""Assembles the PTX that a compilation for a GPU writes to a folder.

XLA and Mosaic GPU write their PTX to the folder (`dumping`). `ptxas` and `nvdisasm` of the CUDA
compiler turn the PTX into the machine code that a GPU would run (`kernels`). Nothing in this module
runs on a GPU.
"""

import contextlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from qlora_jax.gpu.sass import Launch, SassKernel, parse
from qlora_jax.runtime.errors import UserError


@contextlib.contextmanager
def dumping(folder: Path) -> Iterator[dict[str, str | bool]]:
    """Makes compilations in the `with` write PTX and launches to `folder`; yields XLA's options."""
    # Mosaic GPU reads this variable at each compilation, and dumps everything to that folder.
    before = os.environ.get("MOSAIC_GPU_DUMP_TO")
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    try:
        yield {"xla_dump_to": str(folder), "xla_dump_emitter_re": ".*"}
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]
        if before is not None:
            os.environ["MOSAIC_GPU_DUMP_TO"] = before


def kernels(folder: Path) -> list[SassKernel]:
    """Assembles and disassembles all kernels whose PTX is in `folder`.

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
    """Returns the path of a program of the CUDA compiler: pip's, else the system's.

    Raises:
      UserError: the program is not installed.
    """
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob(f"cu*/bin/{name}"), reverse=True):
            return str(path)
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise UserError(f"{name} is not installed; run make gpu-check")
    return found


def _assemble(ptx: Path, text: str, launches: Mapping[str, Launch]) -> list[SassKernel]:
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
        SassKernel(
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
    # In a canonicalized module, a constant's name holds its value: %c128, %c32768_i32.
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
