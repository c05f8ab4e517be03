"""The gradient, computed layer by layer: how a GPU runs `remat: full` and `remat: host`.

The forward pass runs one program for each layer, and stores each layer's input on the device or the
host. The backward pass goes from the last layer to the first. It computes each layer again from the
stored input, and adds the layer's gradients to those of the step, or updates the layer at once. So
the residuals of only one layer exist at a time. If nothing needs all gradients before the first
update (`assemble.updates_at_once`), the gradients of only one layer exist at a time as well.
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
from qlora_jax.train.layer_programs import LayeredModel, LayerPrograms, Leaves, Trees, compiled
from qlora_jax.train.offload import Placement
from qlora_jax.train.state import TrainState
from qlora_jax.train.step import Figures, StepProgram, figures_of


class LayerOrder(NamedTuple):
    """The order in which the programs visit the layers of a model.

    Attributes:
      trees: structures of the model's two trees.
      groups: map from the index of a run to the layer group of its trained leaves; the key None
        holds the group outside the layers.
      layers: for each layer, the index of its run and the index of the layer in the run.
    """

    trees: Trees
    groups: Mapping[int | None, layer_groups.LayerGroup]
    layers: Sequence[tuple[int, int]]


def by_layer(
    program: StepProgram, moments: Placement, inputs: Placement, at_once: bool
) -> StepProgram:
    """Returns the functions of a step whose gradient is computed layer by layer.

    Args:
      program: functions of a step whose gradient is one program.
      moments: placement of the optimizer state.
      inputs: placement of the stored layer inputs.
      at_once: whether to update each layer as soon as its gradients exist.
    """
    programs = compiled(program.recipe)
    return dataclasses.replace(
        program,
        gradient=partial(gradient, programs, inputs),
        direct=partial(step, programs, inputs, program, moments) if at_once else None,
        layer_programs=programs,
    )


def gradient(
    programs: LayerPrograms,
    inputs: Placement,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[Any, Figures]:
    """Computes the gradients of the trained tree and the figures; see `StepProgram.gradient`.

    Args:
      programs: gradient programs, from `compiled`.
      inputs: placement of the stored layer inputs.
      state, frozen, batch, key: arguments of `StepProgram.gradient`.
    """
    order, model = split_layers(state.trained, frozen)
    count, factor = programs.begin(state.scale, batch["mask"])
    steps = batch["mask"].shape[0]
    keys = [None] * steps if key is None else jax.random.split(key, batch["mask"].shape[:2])
    sums, total = list(programs.zeros(steps == 1, model.trained)), jnp.float32(0)

    def add(group: layer_groups.LayerGroup, index: int, grads: Leaves) -> None:
        added = programs.add([sums[p] for p in group.places], grads, np.int32(index))
        for p, leaf in zip(group.places, added):
            sums[p] = leaf

    for step, own in enumerate(keys):
        rows = {name: x[step] for name, x in batch.items()}
        result = forward_pass(programs, inputs, order, model, rows, own, factor)
        backward_pass(programs, inputs, order, model, rows, result, add)
        total += result.total
    grads, figures = programs.finish(sums, total, count, state.scale)
    return jax.tree.unflatten(order.trees.trained, grads), figures


def step(
    programs: LayerPrograms,
    inputs: Placement,
    program: StepProgram,
    moments: Placement,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[TrainState, Figures]:
    """Updates each layer as soon as its gradients exist; see `StepProgram.direct`.

    If gradients are clipped, a first backward pass computes their norm, and a second backward pass
    updates the layers.

    Args:
      programs: gradient programs, from `compiled`.
      inputs: placement of the stored layer inputs.
      program: functions that update a layer (`update_layer`) and count a step (`count`).
      moments: placement of the optimizer state.
      state, frozen, batch, key: arguments of `StepProgram.gradient`, with one micro-batch.
    """
    order, model = split_layers(state.trained, frozen)
    count, factor = programs.begin(state.scale, batch["mask"])
    leaves, states = list(model.trained), list(state.optimizer)
    first = _first_layers(order)
    square, finite = jnp.float32(0), jnp.bool_(True)
    shrink, on_way = None, []

    def measure(_: layer_groups.LayerGroup, __: int, grads: Leaves) -> None:
        nonlocal square, finite
        square, finite = programs.squares(square, grads)

    def update(group: layer_groups.LayerGroup, index: int, grads: Leaves) -> None:
        place = first[group.run] + index
        if shrink is None:
            measure(group, index, grads)
        else:
            grads = programs.scaled(grads, shrink)
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
    result = forward_pass(programs, inputs, order, model, rows, key, factor)
    if program.recipe.clip_norm:
        again = result._replace(g=jnp.copy(result.g), waiting=list(result.waiting))
        backward_pass(programs, inputs, order, model, rows, again, measure)
        shrink = programs.shrink(square)
    backward_pass(programs, inputs, order, model, rows, result, update)
    figures = figures_of(result.total, count, jnp.sqrt(square))
    counters = program.count((state.step, state.scale, state.finite_steps), figures.finite)
    trained = jax.tree.unflatten(order.trees.trained, leaves)
    return TrainState(trained, tuple(states), *counters), figures


class ForwardResult(NamedTuple):
    """The results of the forward pass that the backward pass needs.

    Attributes:
      total: summed loss.
      g: gradient with respect to the output of the last layer.
      outer: gradients of the trained leaves outside the layers, from the loss and the final norm.
      waiting: stored layer inputs, from the first layer to the last.
      shared, own: further inputs of the layers: one for all layers, and a stack of one per layer.
    """

    total: jax.Array
    g: jax.Array
    outer: Leaves
    waiting: list[Any]
    shared: Any
    own: Any


def forward_pass(
    programs: LayerPrograms,
    inputs: Placement,
    order: LayerOrder,
    model: LayeredModel,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
    factor: jax.Array,
) -> ForwardResult:
    """Runs all layers forward, then computes the loss and its gradient.

    Args:
      programs: gradient programs, from `compiled`.
      inputs: placement of the stored layer inputs.
      order, model: results of `split_layers`.
      batch: batch arrays, [B, T].
      key: random key of dropout; None without dropout.
      factor: factor on the loss before it is differentiated.
    """
    x, shared, own = programs.enter(order.trees, model, batch, key)
    waiting: list[Any] = []
    for place, index in order.layers:
        y = programs.forward(order.trees, place, model, np.int32(index), x, shared, own)
        waiting.append(inputs.store(programs.pack(x)))
        x = y
        if len(waiting) > 1:
            inputs.wait(waiting[-2])
    total, g, outer = programs.top(order.trees, model, x, batch, key, factor)
    return ForwardResult(total, g, outer, waiting, shared, own)


def backward_pass(
    programs: LayerPrograms,
    inputs: Placement,
    order: LayerOrder,
    model: LayeredModel,
    batch: Mapping[str, jax.Array],
    result: ForwardResult,
    use: Callable[[layer_groups.LayerGroup, int, Leaves], None],
) -> None:
    """Runs all layers backward, and passes the gradients of each layer to `use`.

    Args:
      programs, inputs, order, model, batch: arguments of `forward_pass`.
      result: result of `forward_pass`; `g` is donated, and `waiting` is empty afterwards.
      use: function (group, index, gradients), called for each layer with trained leaves, from the
        last to the first, and then for the group outside the layers, if there is one. The function
        may replace the layer's trained leaves.
    """
    trees, groups, layers = order
    g, waiting = result.g, result.waiting
    ahead = inputs.fetch(waiting.pop())
    for place, index in reversed(layers):
        x, ahead = ahead, inputs.fetch(waiting.pop()) if waiting else None
        x, beside = programs.unpack(x), (result.shared, result.own)
        g, grads = programs.backward(trees, place, model, np.int32(index), x, g, *beside)
        if place in groups:
            use(groups[place], index, grads)
    if None in groups:
        both = zip(result.outer, programs.bottom(trees, model, batch, g))
        use(groups[None], 0, [a + b for a, b in both])


def split_layers(trained: Any, frozen: Any) -> tuple[LayerOrder, LayeredModel]:
    """Returns the order of the layers of a model, and the leaves of its two trees."""
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
    return LayerOrder(trees, groups, layers), LayeredModel(trained_leaves, frozen_leaves)


def _first_layers(order: LayerOrder) -> dict[int | None, int]:
    """Returns, for each group, the number of layers in the groups before it."""
    starts = itertools.accumulate((group.size for group in order.groups.values()), initial=0)
    return dict(zip(order.groups, starts))
