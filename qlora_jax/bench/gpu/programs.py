"""Programs as data, so that what a GPU would run can also be compiled where there is none."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from qlora_jax.runtime.device import cpu_cores
from qlora_jax.runtime.errors import OutOfTime

CompiledOrError = jax.stages.Compiled | Exception


class BenchProgram(NamedTuple):
    """A function and the shapes it is compiled for.

    Attributes:
      name: names the result that it gives.
      function: takes arrays, or trees of them.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      options: of XLA's compiler.
      donate: positions of donated arguments.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = {}
    donate: tuple[int, ...] = ()


def as_options(flags: str) -> dict[str, bool | int]:
    """Returns flags for XLA, `--name=VALUE`, as compiler options.

    `VALUE` is true, false or an integer. A flag that adds to a list, `--name=+VALUE`, is left out:
    an option would replace the list.
    """
    pairs = (flag.removeprefix("--").split("=") for flag in flags.split())
    return {name: json.loads(value) for name, value in pairs if not value.startswith("+")}


def compiled(program: BenchProgram) -> jax.stages.Compiled:
    """Compiles one program for the default device."""
    return _lowered(program).compile(dict(program.options) or None)


def usable(outcome: CompiledOrError) -> jax.stages.Compiled:
    """Returns a compiled program; raises the error that compiling gave instead."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def compile_all(
    programs: Iterable[BenchProgram], more: Callable[[], bool]
) -> Iterator[CompiledOrError]:
    """Yields each program compiled, or the error it gives, in order.

    Programs are traced one after another and compiled in threads.

    Args:
      programs: what to compile.
      more: asked before each is traced; after False the rest gives `OutOfTime`.
    """
    with ThreadPoolExecutor(max(1, cpu_cores() - 1)) as pool:
        waiting: list[Future[jax.stages.Compiled] | Exception] = []
        for program in programs:
            if not more():
                waiting.append(OutOfTime("there was no time to compile it"))
                continue
            try:
                lowered = _lowered(program)
            except Exception as e:  # the tracer's own errors, of many kinds
                waiting.append(e)
            else:
                waiting.append(pool.submit(lowered.compile, dict(program.options) or None))
        for future in waiting:
            if isinstance(future, Exception):
                yield future
                continue
            try:
                yield future.result()
            except Exception as e:  # several compilers, each with errors of its own
                yield e


def _lowered(program: BenchProgram) -> jax.stages.Lowered:
    return jax.jit(program.function, donate_argnums=program.donate).lower(*program.arguments)
