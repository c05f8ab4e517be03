"""The gradient a layer at a time: what `remat: full` and `remat: host` are on a device.

The forward pass is a program for each layer, and what a layer read waits on the device or the
host. The backward pass goes back through the layers: each is computed again from what it read, and
its gradients are added to those of the step, or used for its update at once. So no more than one
layer's residuals exist, and where nothing has to know all gradients before the first update, no
more than one layer's gradients.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.train import layer_groups
from qlora_jax.train.layer_programs import Layered, LayeredModel, Leaves, Trees, compiled
from qlora_jax.train.offload import Placement
from qlora_jax.train.step import Figures, StepProgram, TrainState, figures_of


class Walk(NamedTuple):
    """The way through a model.

    Attributes:
      trees: its structure.
      groups: of its trained leaves, by run; None is outside the layers.
      layers: the run of each layer, and the layer's index in it.
    """

    trees: Trees
    groups: Mapping[int | None, layer_groups.LayerGroup]
    layers: Sequence[tuple[int, int]]


def of(program: StepProgram, moments: Placement, inputs: Placement, at_once: bool) -> StepProgram:
    """Returns the functions of a step with a gradient that goes layer by layer.

    Args:
      program: with a gradient in one program.
      moments: where the optimizer's state lives.
      inputs: where the layers' inputs wait.
      at_once: update each layer as soon as its gradients are there.
    """
    parts = compiled(program.recipe)
    return dataclasses.replace(
        program,
        gradient=partial(gradient, parts, inputs),
        direct=partial(step, parts, inputs, program, moments) if at_once else None,
        parts=parts,
    )


def gradient(
    parts: Layered,
    inputs: Placement,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[Any, Figures]:
    """Computes the gradients of the trained tree, and figures: `StepProgram.gradient`.

    Args:
      parts: from `compiled`.
      inputs: where the layers' inputs wait.
      state, frozen, batch, key: as `StepProgram.gradient` takes them.
    """
    way, model = taken_apart(state.trained, frozen)
    count, factor = parts.begin(state.scale, batch["mask"])
    steps = batch["mask"].shape[0]
    keys = [None] * steps if key is None else jax.random.split(key, batch["mask"].shape[:2])
    sums, total = list(parts.zeros(steps == 1, model.trained)), jnp.float32(0)

    def add(group: layer_groups.LayerGroup, index: int, grads: Leaves) -> None:
        added = parts.add([sums[p] for p in group.places], grads, np.int32(index))
        for p, leaf in zip(group.places, added):
            sums[p] = leaf

    for step, own in enumerate(keys):
        rows = {name: x[step] for name, x in batch.items()}
        up = ascend(parts, inputs, way, model, rows, own, factor)
        descend(parts, inputs, way, model, rows, up, add)
        total += up.total
    grads, figures = parts.finish(sums, total, count, state.scale)
    return jax.tree.unflatten(way.trees.trained, grads), figures


def step(
    parts: Layered,
    inputs: Placement,
    program: StepProgram,
    moments: Placement,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[TrainState, Figures]:
    """Updates each layer as soon as its gradients are there: `StepProgram.direct`.

    Where gradients are clipped, a first way down through the layers finds their norm.

    Args:
      parts: from `compiled`.
      inputs: where the layers' inputs wait.
      program: what updates a unit and counts a step.
      moments: where the optimizer's state lives.
      state, frozen, batch, key: as `StepProgram.gradient` takes them, of one micro-batch.
    """
    way, model = taken_apart(state.trained, frozen)
    count, factor = parts.begin(state.scale, batch["mask"])
    leaves, states = list(model.trained), list(state.optimizer)
    first = _first_units(way)
    square, finite = jnp.float32(0), jnp.bool_(True)
    shrink, on_way = None, []

    def measure(_: layer_groups.LayerGroup, __: int, grads: Leaves) -> None:
        nonlocal square, finite
        square, finite = parts.squares(square, grads)

    def update(group: layer_groups.LayerGroup, index: int, grads: Leaves) -> None:
        place = first[group.run] + index
        if shrink is None:
            measure(group, index, grads)
        else:
            grads = parts.scaled(grads, shrink)
        own = [leaves[p] for p in group.places]
        own_moments = moments.fetch(states[place])
        new, own_moments = program.update_layer(
            group, own, grads, np.int32(index), own_moments, finite
        )
        for p, leaf in zip(group.places, new):
            leaves[p] = leaf
        states[place] = moments.store(own_moments)
        on_way.append(states[place])
        if len(on_way) > 1:
            moments.wait(on_way.pop(0))

    rows = {name: x[0] for name, x in batch.items()}
    key = None if key is None else jax.random.split(key, batch["mask"].shape[:2])[0]
    model = LayeredModel(leaves, model.frozen)
    up = ascend(parts, inputs, way, model, rows, key, factor)
    if program.recipe.clip_norm:
        again = up._replace(g=jnp.copy(up.g), waiting=list(up.waiting))
        descend(parts, inputs, way, model, rows, again, measure)
        shrink = parts.shrink(square)
    descend(parts, inputs, way, model, rows, up, update)
    figures = figures_of(up.total, count, jnp.sqrt(square))
    counters = program.count((state.step, state.scale, state.finite_steps), figures.finite)
    trained = jax.tree.unflatten(way.trees.trained, leaves)
    return TrainState(trained, tuple(states), *counters), figures


class Ascent(NamedTuple):
    """Holds what the backward pass needs of the forward pass.

    Attributes:
      total: the summed loss.
      g: the gradient of the last layer's output.
      outer: gradients of trained leaves outside the layers.
      waiting: the layers' inputs, the first layer's first.
      shared, own: what layers read beside them.
    """

    total: jax.Array
    g: jax.Array
    outer: Leaves
    waiting: list[Any]
    shared: Any
    own: Any


def ascend(
    parts: Layered,
    inputs: Placement,
    way: Walk,
    model: LayeredModel,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
    factor: jax.Array,
) -> Ascent:
    """Runs all layers forward, then the loss and its gradient.

    Args:
      parts: from `compiled`.
      inputs: where the layers' inputs wait.
      way, model: from `taken_apart`.
      batch: arrays [B, T].
      key: of dropout, or None.
      factor: on the loss that is differentiated.
    """
    x, shared, own = parts.enter(way.trees, model, batch, key)
    waiting: list[Any] = []
    for place, index in way.layers:
        y = parts.forward(way.trees, place, model, np.int32(index), x, shared, own)
        waiting.append(inputs.store(parts.pack(x)))
        x = y
        if len(waiting) > 1:
            inputs.wait(waiting[-2])
    total, g, outer = parts.top(way.trees, model, x, batch, key, factor)
    return Ascent(total, g, outer, waiting, shared, own)


def descend(
    parts: Layered,
    inputs: Placement,
    way: Walk,
    model: LayeredModel,
    batch: Mapping[str, jax.Array],
    up: Ascent,
    use: Callable[[layer_groups.LayerGroup, int, Leaves], None],
) -> None:
    """Runs all layers backward, and hands their gradients on.

    Args:
      parts, inputs, way, model, batch: as `ascend` takes them.
      up: the result of `ascend`; its `g` is donated, and its `waiting` is empty afterwards.
      use: gets each group's gradients, layer by layer, from the last to the first; it may replace
        the trained leaves of the model that it gets gradients of.
    """
    trees, groups, layers = way
    g, waiting = up.g, up.waiting
    ahead = inputs.fetch(waiting.pop())
    for place, index in reversed(layers):
        x, ahead = ahead, inputs.fetch(waiting.pop()) if waiting else None
        x, beside = parts.unpack(x), (up.shared, up.own)
        g, grads = parts.backward(trees, place, model, np.int32(index), x, g, *beside)
        if place in groups:
            use(groups[place], index, grads)
    if None in groups:
        both = zip(up.outer, parts.bottom(trees, model, batch, g))
        use(groups[None], 0, [a + b for a, b in both])


def taken_apart(trained: Any, frozen: Any) -> tuple[Walk, LayeredModel]:
    """Returns the way through a model of two trees, and their leaves."""
    trained_leaves, trained_structure = jax.tree.flatten(trained)
    frozen_leaves, frozen_structure = jax.tree.flatten(frozen)
    sizes = {
        place: jax.tree.leaves(stack)[0].shape[0]
        for tree in (trained, frozen)
        for place, stack in tree.get(layer_groups.STACKS, {}).items()
    }
    layers = [(place, i) for place in sorted(sizes) for i in range(sizes[place])]
    groups = {group.run: group for group in layer_groups.find_groups(trained)}
    trees = Trees(trained_structure, frozen_structure)
    return Walk(trees, groups, layers), LayeredModel(trained_leaves, frozen_leaves)


def _first_units(way: Walk) -> dict[int | None, int]:
    """Returns the index of each group's first unit among those of all groups."""
    starts = itertools.accumulate((group.size for group in way.groups.values()), initial=0)
    return dict(zip(way.groups, starts))
