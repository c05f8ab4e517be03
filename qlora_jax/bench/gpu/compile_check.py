"""Compiles every program of `qlora-jax bench gpu` for GPUs that this machine does not have.

Each GPU and part has a process of its own, `python -m qlora_jax.bench.gpu.compile_check GPU PART`,
for three reasons: a compiler that aborts then loses one program only, a part may have flags, and
Mosaic GPU keeps the architecture of the first compilation in a process.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from qlora_jax.bench.gpu.lane import FULL
from qlora_jax.bench.gpu.parts import PARTS, BenchPart
from qlora_jax.bench.gpu.programs import BenchProgram
from qlora_jax.gpu.compile import compile_lowered, environment, has_plugin, lower_for
from qlora_jax.gpu.described import read_gpu
from qlora_jax.gpu.processes import Died, answers
from qlora_jax.runtime.errors import UserError, first_line

GPUS = ("h100", "a100")
COMMAND = [sys.executable, "-m", "qlora_jax.bench.gpu.compile_check"]
AT_ONCE = 2
"""Number of processes at a time; each takes a core and up to 4 GB of memory."""

LISTING = "the list of its programs"
"""Name in the outcome of a part that gives an error instead of its programs."""


class CompileTask(NamedTuple):
    """The programs of one part for one GPU.

    Attributes:
      gpu: a name in `gpu.described.GPUS`.
      part: the part that runs the programs.
      names: names of the programs.
      error: error that prevented the list of programs; None if there was no error.
    """

    gpu: str
    part: BenchPart
    names: Sequence[str]
    error: str | None = None


class CompileOutcome(NamedTuple):
    """The outcome of the compilation of one program.

    Attributes:
      gpu, part, name: GPU, part and name of the program.
      error: the first line of the compiler's or the tracer's error; None if it compiled.
      seconds: seconds of tracing and compilation.
      repeated: whether the same program was compiled before, under another name.
    """

    gpu: str
    part: str
    name: str
    error: str | None
    seconds: float = 0.0
    repeated: bool = False

    def __str__(self) -> str:
        return f"{self.gpu}, {self.part}, {self.name}: {self.error}"


def tasks(gpus: Iterable[str] = GPUS, parts: Iterable[BenchPart] = PARTS) -> Iterator[CompileTask]:
    """Yields a task for each part and GPU, with the names of the programs."""
    for part, gpu in itertools.product(parts, gpus):
        try:
            names = [program.name for program in part.module.programs(FULL, read_gpu(gpu))]
        except Exception as e:  # tracing raises errors of many kinds
            yield CompileTask(gpu, part, [], f"{type(e).__name__}: {first_line(e)}")
        else:
            yield CompileTask(gpu, part, names)


def compile_all(
    chosen: Sequence[CompileTask], tell: Callable[[CompileOutcome], None]
) -> list[CompileOutcome]:
    """Returns the outcome of every program, in order.

    Args:
      chosen: tasks to compile.
      tell: function that gets each outcome at once, from several threads.

    Raises:
      UserError: the compile-only packages are not installed.
    """
    if not has_plugin():
        raise UserError("the compile-only GPU packages are not installed; run make gpu-check")

    def outcomes(task: CompileTask) -> list[CompileOutcome]:
        found = []
        for outcome in _of_task(task):
            tell(outcome)
            found.append(outcome)
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(itertools.chain.from_iterable(pool.map(outcomes, chosen)))


def summary(outcomes: Sequence[CompileOutcome]) -> str:
    """Returns the last line: the numbers of compiled programs, of GPUs and of failures."""
    gpus = {outcome.gpu for outcome in outcomes}
    failed = sum(outcome.error is not None for outcome in outcomes)
    each = (len(outcomes) - failed) / max(1, len(gpus))
    return f"{each:g} programs of bench gpu x {len(gpus)} GPUs compiled, {failed} failed"


def table(outcomes: Sequence[CompileOutcome]) -> list[str]:
    """Returns a line per GPU and part: numbers of programs and of different ones, seconds."""
    lines = []
    for (gpu, part), group in itertools.groupby(outcomes, key=lambda outcome: outcome[:2]):
        some = list(group)
        fresh = sum(not outcome.repeated for outcome in some)
        seconds = sum(outcome.seconds for outcome in some)
        lines.append(f"{gpu} {part}: {len(some)} programs, {fresh} different, {seconds:.0f} s")
    return lines


def _of_task(task: CompileTask) -> Iterator[CompileOutcome]:
    if task.error is not None:
        yield CompileOutcome(task.gpu, task.part.name, LISTING, task.error)
    command = [*COMMAND, task.gpu, task.part.name]
    indices = [str(i) for i in range(len(task.names))]
    made = answers(command, indices, environment(*task.part.flags.split()))
    for name, answer in zip(task.names, made, strict=True):
        if isinstance(answer, Died):
            yield CompileOutcome(task.gpu, task.part.name, name, answer.reason)
        else:
            yield CompileOutcome(task.gpu, task.part.name, name, *json.loads(answer))


class _Compiler:
    """A compiler for one GPU that compiles equal programs once."""

    def __init__(self, gpu: str) -> None:
        self._gpu = gpu
        self._known: dict[Any, str | None] = {}

    def outcome(self, program: BenchProgram) -> tuple[str | None, float, bool]:
        """Returns `error`, `seconds` and `repeated` of `CompileOutcome`."""
        began = time.monotonic()
        repeated, error = False, None
        try:
            lowered = lower_for(
                self._gpu, program.function, *program.arguments, donate=program.donate
            )
            same = hash(lowered.as_text()), tuple(sorted(program.options.items()))
            repeated = same in self._known
            error = self._known[same] if repeated else _compile(lowered, program)
            self._known[same] = error
        except Exception as e:  # tracing raises errors of many kinds
            error = _line(e)
        return error, round(time.monotonic() - began, 2), repeated


def _compile(lowered: jax.stages.Lowered, program: BenchProgram) -> str | None:
    try:
        compile_lowered(lowered, program.options)
    except Exception as e:  # each compiler raises its own kinds of errors
        return _line(e)
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def main() -> None:
    """Reads indices of programs from standard input and writes their outcomes, one per line."""
    gpu, name = sys.argv[1:]
    (part,) = (part for part in PARTS if part.name == name)
    programs, compiler = list(part.module.programs(FULL, read_gpu(gpu))), _Compiler(gpu)
    for line in sys.stdin:
        print(json.dumps(compiler.outcome(programs[int(line)])), flush=True)


if __name__ == "__main__":
    main()
