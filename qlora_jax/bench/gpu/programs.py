"""Describes programs as data, so that GPU programs can be compiled without a GPU too."""

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
      name: name of the result that the program gives.
      function: function of arrays, or of trees of arrays.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      options: options of XLA's compiler.
      donate: positions of donated arguments.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = {}
    donate: tuple[int, ...] = ()


def as_options(flags: str) -> dict[str, bool | int]:
    """Returns flags for XLA, `--name=VALUE`, as compiler options.

    `VALUE` is true, false or an integer. A flag that adds to a list, `--name=+VALUE`, is left out,
    because an option would replace the list.
    """
    pairs = (flag.removeprefix("--").split("=") for flag in flags.split())
    return {name: json.loads(value) for name, value in pairs if not value.startswith("+")}


def compiled(program: BenchProgram) -> jax.stages.Compiled:
    """Compiles one program for the default device."""
    return _lowered(program).compile(dict(program.options) or None)


def usable(outcome: CompiledOrError) -> jax.stages.Compiled:
    """Returns the compiled program, or raises the error of its compilation."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def compile_all(
    programs: Iterable[BenchProgram], more: Callable[[], bool]
) -> Iterator[CompiledOrError]:
    """Yields for each program, in order, the compiled program or the error of its compilation.

    Programs are traced one after another and compiled in threads.

    Args:
      programs: programs to compile.
      more: function that says whether time is left; called before each program is traced. If it
        returns False, the program gives `OutOfTime`.
    """
    with ThreadPoolExecutor(max(1, cpu_cores() - 1)) as pool:
        waiting: list[Future[jax.stages.Compiled] | Exception] = []
        for program in programs:
            if not more():
                waiting.append(OutOfTime("there was no time to compile it"))
                continue
            try:
                lowered = _lowered(program)
            except Exception as e:  # tracing raises errors of many kinds
                waiting.append(e)
            else:
                waiting.append(pool.submit(lowered.compile, dict(program.options) or None))
        for future in waiting:
            if isinstance(future, Exception):
                yield future
                continue
            try:
                yield future.result()
            except Exception as e:  # each compiler raises its own kinds of errors
                yield e


def _lowered(program: BenchProgram) -> jax.stages.Lowered:
    return jax.jit(program.function, donate_argnums=program.donate).lower(*program.arguments)
