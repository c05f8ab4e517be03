"""Timing of jax functions over sets of inputs that take turns; for our side and jax peers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.bench import measure

PASSES = 20
"""Rounds over the inputs within one timed program on a GPU."""

Inputs = tuple[Any, ...]


def seconds(
    function: Callable[..., Any], sets: Sequence[Inputs], samples: int, jit: bool = True
) -> list[float]:
    """Seconds per call, on the default device.

    On a CPU each sample is one call. On a GPU a call takes less than its dispatch: there a sample
    is one program that goes over all sets of inputs `PASSES` times.

    Args:
      function: of one set of inputs.
      sets: of arguments.
      samples: how many to take, after one to warm up.
      jit: on a CPU, whether to compile the function; one that is a program already need not be.
    """
    if jax.default_backend() == "gpu":
        return each_of_many(function, sets, PASSES, samples)
    return one_by_one(jax.jit(function) if jit else function, sets, samples)


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


def each_of_many(
    function: Callable[..., Any], sets: Sequence[Inputs], passes: int, samples: int
) -> list[float]:
    """Seconds per call within a program that calls `function` on all sets, `passes` times."""
    program = jax.jit(functools.partial(over_all, function, passes))
    calls = len(sets) * passes

    def call() -> float:
        return measure.timed(lambda: jax.block_until_ready(program(sets))) / calls

    return measure.take(call, samples)


def over_all(function: Callable[..., Any], passes: int, sets: Sequence[Inputs]) -> Any:
    """Results of the last of `passes` rounds over the sets."""

    def once(_: jax.Array, previous: Any) -> Any:
        # Without the barrier a round would not depend on the one before and be computed once. (It
        # does not hold XLA:CPU back, which drops it early; XLA:GPU keeps it until after that.)
        sets_, _ = jax.lax.optimization_barrier((sets, previous))
        return [function(*arguments) for arguments in sets_]

    shapes = jax.eval_shape(lambda: [function(*arguments) for arguments in sets])
    first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, passes, once, first)
