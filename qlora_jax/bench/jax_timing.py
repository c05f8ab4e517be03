"""Timing of jax functions over sets of inputs that take turns; for our side and jax peers."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.bench import measure
from qlora_jax.bench.cases import OperationCase

ROUNDS = 10
"""Rounds over the inputs within one pass: between passes a GPU waits for the host."""

SAMPLE = 0.02
"""Seconds of a timed program, about; more where one pass takes longer."""

DISPATCHES = 5
"""Empty programs that are timed, to know the time of a dispatch."""

Inputs = tuple[Any, ...]


def seconds(
    function: Callable[..., Any], sets: Sequence[Inputs], samples: int, jit: bool = True
) -> list[float]:
    """Seconds per call, on the default device.

    On a CPU each sample is one call. On a GPU a call takes less than its dispatch: there a sample
    is one program that makes many (`program_seconds`).

    Args:
      function: of one set of inputs.
      sets: of arguments.
      samples: how many to take, after one to warm up.
      jit: on a CPU, whether to compile the function; one that is a program already need not be.
    """
    if jax.default_backend() == "gpu":
        return program_seconds(compiled(function, sets), sets, samples)
    return one_by_one(jax.jit(function) if jit else function, sets, samples)


def drawn(case: OperationCase) -> tuple[jax.Array, jax.Array]:
    """A case's float32 weight [k, n] and operand [rows, k or n]; on a GPU they are drawn there."""
    if jax.default_backend() != "gpu":
        return jnp.asarray(case.weight()), jnp.asarray(case.operand())
    first, second = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(first, (case.k, case.n), jnp.float32)
    return weight, jax.random.normal(second, case.operand_shape, jnp.float32)


def copies(arguments: Inputs, count: int) -> list[Inputs]:
    """Sets of equal arguments, each in buffers of its own."""
    fresh = functools.partial(jnp.array, copy=True)
    return jax.block_until_ready([jax.tree.map(fresh, arguments) for _ in range(count)])


def one_by_one(function: Callable[..., Any], sets: Sequence[Inputs], samples: int) -> list[float]:
    """Seconds of single calls, the sets of inputs in turn."""
    turn = 0

    def call() -> float:
        nonlocal turn
        turn += 1
        arguments = sets[turn % len(sets)]
        return measure.timed(lambda: jax.block_until_ready(function(*arguments)))

    return measure.take(call, samples)


def compiled(function: Callable[..., Any], sets: Sequence[Inputs]) -> jax.stages.Compiled:
    """`over_all` of a function, compiled for the default device and sets like these."""
    return jax.jit(functools.partial(over_all, function)).lower(np.int32(0), sets).compile()


def program_seconds(
    program: jax.stages.Compiled, sets: Sequence[Inputs], samples: int
) -> list[float]:
    """Seconds per call within a program that makes many.

    As many passes are made as take about `SAMPLE`. What a program of no passes takes, a dispatch,
    is not counted.

    Args:
      program: of `compiled`.
      sets: what it goes over.
      samples: how many to take, after one to warm up.
    """

    def took(passes: int) -> float:
        return measure.timed(lambda: jax.block_until_ready(program(np.int32(passes), sets)))

    took(1)
    dispatch = statistics.median(measure.take(lambda: took(0), DISPATCHES))
    passes = 1
    while (own := took(passes) - dispatch) < SAMPLE / 2:
        passes *= min(max(2, round(SAMPLE / max(own, SAMPLE / 16))), 16)
    calls = passes * ROUNDS * len(sets)
    return measure.take(lambda: (took(passes) - dispatch) / calls, samples)


def over_all(function: Callable[..., Any], passes: jax.Array | int, sets: Sequence[Inputs]) -> Any:
    """Calls a function on all sets, `passes` times `ROUNDS` times, and returns the last results.

    Args:
      function: of one set of inputs.
      passes: int32[], traced, so that one program serves any number; 0 gives zeros.
      sets: of arguments.
    """

    def once(_: jax.Array, previous: Any) -> Any:
        # Without the barrier a round would not depend on the one before and be computed once. (It
        # does not hold XLA:CPU back, which drops it early; XLA:GPU keeps it until after that.)
        sets_, _ = jax.lax.optimization_barrier((sets, previous))
        return [function(*arguments) for arguments in sets_]

    def one_pass(_: jax.Array, previous: Any) -> Any:
        return jax.lax.fori_loop(0, ROUNDS, once, previous)

    shapes = jax.eval_shape(lambda: [function(*arguments) for arguments in sets])
    first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, passes, one_pass, first)
