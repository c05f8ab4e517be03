"""Lists the programs of a step's gradient, with the bytes of all arrays that exist meanwhile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.plan.device_bytes import nbytes
from qlora_jax.plan.exact import gradients
from qlora_jax.train import layered
from qlora_jax.train import step as steps
from qlora_jax.train.state import TrainState

ON_THE_WAY = 3
"""Largest number of layer inputs on the device while the others wait in host memory."""


class GradientProgram(NamedTuple):
    """One program of a step's gradient.

    Attributes:
      name: "gradient", or name of the part, such as "backward of a layer".
      function: function to compile.
      arguments: trees of shapes.
      donate: positions of donated arguments.
      alive: device bytes of all arrays that exist while the program runs: with its arguments,
        without moments and without its results.
      host: bytes of arrays in pinned host memory while the program runs, without moments.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...]
    alive: int
    host: int = 0


def gradient_programs(
    program: steps.StepProgram, state: TrainState, frozen: Any, batch: Any, key: Any
) -> Iterator[GradientProgram]:
    """Yields the programs of a step's gradient: one, or one for each part of a layered gradient.

    Args:
      program: functions of the step.
      state: shapes of the training state; the moments are not read.
      frozen, batch, key: shapes of the gradient's other arguments.
    """
    model = nbytes((state.trained, frozen, batch))
    if program.layer_programs is None:
        bare = state._replace(optimizer=())
        yield GradientProgram("gradient", program.gradient, (bare, frozen, batch, key), (), model)
        return
    yield from _by_layer(program, state.trained, frozen, batch, key, model)


def _by_layer(
    program: steps.StepProgram, trained: Any, frozen: Any, batch: Any, key: Any, alive: int
) -> Iterator[GradientProgram]:
    programs = program.layer_programs
    (trees, groups, layers), leaves = layered.split_layers(trained, frozen)
    micro = batch["mask"].shape[0]
    rows = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    if key is not None:  # each row has its own key
        key = jax.eval_shape(partial(jax.random.split, num=batch["mask"].shape[1]), key)
    number, index = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32))

    def entered(model: Any, rows: Any, key: Any) -> Any:
        return programs.enter(trees, model, rows, key)

    def top(model: Any, x: Any, rows: Any, key: Any, factor: Any) -> Any:
        return programs.top(trees, model, x, rows, key, factor)

    def bottom(model: Any, rows: Any, g: Any) -> Any:
        return programs.bottom(trees, model, rows, g)

    def backward(place: int, *arguments: Any) -> Any:
        return programs.backward(trees, place, *arguments)

    x, shared, own = jax.eval_shape(entered, leaves, rows, key)
    away = program.recipe.remat == "host"
    packed = nbytes(jax.eval_shape(programs.pack, x))
    waiting = packed * len(layers)
    inputs, host = (min(ON_THE_WAY * packed, waiting), waiting) if away else (waiting, 0)
    if program.direct is None:
        alive += nbytes(gradients(trained, micro))
    elif program.recipe.clip_norm:
        alive += nbytes(x)  # the gradient of the last layer's output, for the second backward pass
    alive += nbytes((shared, own)) + inputs
    yield GradientProgram(
        "loss", top, (leaves, x, rows, key, number), (1,), alive + nbytes(x), host
    )
    if packed != nbytes(x):
        yield GradientProgram(
            "a layer's input in 8 bits", programs.pack, (x,), (), alive + 2 * nbytes(x), host
        )
        alive += nbytes(x)  # the unpacked input of one layer, beside all packed inputs
    alive += nbytes((x, jax.eval_shape(top, leaves, x, rows, key, number)[2]))
    # No program for a layer's forward pass: its backward pass holds the same arrays and more.
    for place in dict.fromkeys(place for place, _ in layers):
        arguments = leaves, index, x, x, shared, own
        function = partial(backward, place)
        yield GradientProgram("backward of a layer", function, arguments, (3,), alive, host)
    if None in groups:
        name = "backward of the embedding"
        yield GradientProgram(name, bottom, (leaves, rows, x), (), alive - inputs)
