"""Times jax functions over sets of inputs that take turns, for our side and jax peers."""

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
"""Rounds over the inputs in one pass; a GPU waits for the host only between passes."""

SAMPLE = 0.02
"""Approximate seconds of a timed program; a single pass may take longer."""

DISPATCHES = 5
"""Number of empty programs that are timed to measure a dispatch."""

Inputs = tuple[Any, ...]


def seconds(
    function: Callable[..., Any], sets: Sequence[Inputs], samples: int, jit: bool = True
) -> list[float]:
    """Returns the seconds per call on the default device, one value per sample.

    On a CPU, each sample is one call. On a GPU, a call takes less time than its dispatch, so that a
    sample is one program that makes many calls (`program_seconds`).

    Args:
      function: function of one set of inputs.
      sets: sets of inputs, each a tuple of arguments.
      samples: number of samples, after one warm-up.
      jit: whether to compile the function on a CPU; False if it compiles its own program.
    """
    if jax.default_backend() == "gpu":
        return program_seconds(compiled(function, sets), sets, samples)
    return one_by_one(jax.jit(function) if jit else function, sets, samples)


def drawn(case: OperationCase) -> tuple[jax.Array, jax.Array]:
    """Returns a case's float32 weight [k, n] and operand [rows, k or n]; a GPU draws its own."""
    if jax.default_backend() != "gpu":
        return jnp.asarray(case.weight()), jnp.asarray(case.operand())
    first, second = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(first, (case.k, case.n), jnp.float32)
    return weight, jax.random.normal(second, case.operand_shape, jnp.float32)


def copies(arguments: Inputs, count: int) -> list[Inputs]:
    """Returns `count` sets of equal arguments, each set in its own buffers."""
    fresh = functools.partial(jnp.array, copy=True)
    return jax.block_until_ready([jax.tree.map(fresh, arguments) for _ in range(count)])


def one_by_one(function: Callable[..., Any], sets: Sequence[Inputs], samples: int) -> list[float]:
    """Returns the seconds of single calls, which use the sets of inputs in turn."""
    turn = 0

    def call() -> float:
        nonlocal turn
        turn += 1
        arguments = sets[turn % len(sets)]
        return measure.timed(lambda: jax.block_until_ready(function(*arguments)))

    return measure.take(call, samples)


def compiled(function: Callable[..., Any], sets: Sequence[Inputs]) -> jax.stages.Compiled:
    """Compiles `over_all` of a function for the default device and the shapes of these sets."""
    return jax.jit(functools.partial(over_all, function)).lower(np.int32(0), sets).compile()


def program_seconds(
    program: jax.stages.Compiled, sets: Sequence[Inputs], samples: int
) -> list[float]:
    """Returns the seconds per call within a program that makes many calls, one per sample.

    The number of passes is chosen so that the program takes about `SAMPLE`. The time of a program
    without passes, which is the time of a dispatch, is subtracted.

    Args:
      program: result of `compiled`.
      sets: sets of inputs that the program uses.
      samples: number of samples, after one warm-up.
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
    """Calls a function on all sets, `passes` x `ROUNDS` times, and returns the last results.

    Args:
      function: function of one set of inputs.
      passes: number of passes, int32[]; traced, so that one program serves any number; 0 gives
        zeros.
      sets: sets of inputs, each a tuple of arguments.
    """

    def once(_: jax.Array, previous: Any) -> Any:
        # The barrier makes each round depend on the one before; without it, XLA would compute only
        # one round. XLA:CPU drops the barrier too early for that; XLA:GPU keeps it long enough.
        sets_, _ = jax.lax.optimization_barrier((sets, previous))
        return [function(*arguments) for arguments in sets_]

    def one_pass(_: jax.Array, previous: Any) -> Any:
        return jax.lax.fori_loop(0, ROUNDS, once, previous)

    shapes = jax.eval_shape(lambda: [function(*arguments) for arguments in sets])
    first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, passes, one_pass, first)
