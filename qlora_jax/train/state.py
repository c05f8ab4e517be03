"""The training state: its value before the first step, and its update by gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlora_jax.models.sharding import MeshLayout
from qlora_jax.train import layer_groups
from qlora_jax.train.offload import ON_DEVICE, Placement

GROWTH_INTERVAL = 2000
"""Finite steps after which the loss scale doubles; every overflow halves the loss scale."""

INITIAL_SCALE = 2.0**15


class TrainState(NamedTuple):
    """The training state: all arrays that a step changes.

    Attributes:
      trained: trained tree.
      optimizer: tuple of optimizer states, one for each layer of each `LayerGroup`.
      step: int32[], number of steps so far, skipped steps included.
      scale: float32[], loss scale; constant 1 unless the compute dtype is float16.
      finite_steps: int32[], number of finite steps since the scale last changed.
    """

    trained: Any
    optimizer: Any
    step: jax.Array
    scale: jax.Array
    finite_steps: jax.Array


def init_state(
    trained: Any,
    optimizer: optax.GradientTransformation,
    dynamic_scale: bool,
    moments: Placement = ON_DEVICE,
    layout: MeshLayout | None = None,
) -> TrainState:
    """Returns the state before the first step; on a mesh, moments are split like parameters."""
    scale = jnp.float32(INITIAL_SCALE if dynamic_scale else 1.0)
    # step and finite_steps need separate buffers, because both are donated
    step, finite_steps = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    if layout is not None:
        step, scale, finite_steps = layout.replicate((step, scale, finite_steps))
    first = jax.jit(partial(init_layer_state, optimizer, layout))
    states = layer_groups.init_layers(trained, lambda layer: moments.store(first(layer)))
    return moments.begin(TrainState(trained, states, step, scale, finite_steps))


def init_layer_state(
    optimizer: optax.GradientTransformation, layout: MeshLayout | None, layer: Mapping[str, Any]
) -> Any:
    """Returns the optimizer state of one layer before the first step."""
    state = optimizer.init(layer)
    return state if layout is None else split_moments(layout, layer, state)


def split_moments(layout: MeshLayout, layer: Mapping[str, Any], state: Any) -> Any:
    """Returns a layer's optimizer state, constrained in `jax.jit` to its sharding on the mesh."""
    return jax.lax.with_sharding_constraint(state, layout.moments(layer, state))


def update_layer(
    optimizer: optax.GradientTransformation,
    layout: MeshLayout | None,
    group: layer_groups.LayerGroup,
    leaves: Sequence[jax.Array],
    grads: Sequence[jax.Array],
    index: jax.Array,
    moments: Any,
    finite: jax.Array,
) -> tuple[Sequence[jax.Array], Any]:
    """Updates one layer of a group if the gradient is finite; see `StepProgram.update_layer`.

    The leading axis of the gradients holds all layers of the group, or this layer alone.
    """
    params = layer_groups.take_layer(group, leaves, index)
    slopes = layer_groups.take_layer(group, grads, jnp.minimum(index, grads[0].shape[0] - 1))
    updates, new = optimizer.update(slopes, moments, params)
    moved = optax.apply_updates(params, updates)
    moved, new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (moved, new), (params, moments))
    if layout is not None:
        new = split_moments(layout, params, new)
    return layer_groups.put_layer(group, leaves, index, moved), new


def count_step(dynamic_scale: bool, counters: Any, finite: jax.Array) -> Any:
    """Returns step, scale and finite_steps of the `TrainState` after a step."""
    step, scale, finite_steps = counters
    if dynamic_scale:
        finite_steps = jnp.where(finite, finite_steps + 1, 0)
        grown = finite_steps >= GROWTH_INTERVAL
        scale = jnp.where(finite, jnp.where(grown, scale * 2, scale), jnp.maximum(scale / 2, 1))
        finite_steps = jnp.where(grown, 0, finite_steps)
    return step + 1, scale, finite_steps


def update_all_layers(
    update_one: Callable[..., tuple[Sequence[jax.Array], Any]],
    count: Callable[..., Any],
    moments: Placement,
    state: TrainState,
    grads: Any,
    finite: jax.Array,
) -> TrainState:
    """Updates all layers, one after another, and counts the step; see `StepProgram.update`.

    Args:
      update_one: compiled `update_layer`.
      count: compiled `count_step`.
      moments: placement of the optimizer state; the state of the next layer is fetched while a
        layer is updated.
      state: training state; donated.
      grads: gradients of the trained tree.
      finite: bool scalar; if False, trained and optimizer do not change.
    """
    leaves, structure = jax.tree.flatten(state.trained)
    slopes = jax.tree.leaves(grads)
    states = list(state.optimizer)
    order = [
        (group, i) for group in layer_groups.find_groups(state.trained) for i in range(group.size)
    ]
    ahead = moments.fetch(states[0])
    for place, (group, index) in enumerate(order):
        own, ahead = ahead, None
        if place + 1 < len(order):
            ahead = moments.fetch(states[place + 1])
        new, own = update_one(
            group,
            [leaves[p] for p in group.places],
            [slopes[p] for p in group.places],
            index,
            own,
            finite,
        )
        for p, leaf in zip(group.places, new):
            leaves[p] = leaf
        states[place] = moments.store(own)
        if place:
            moments.wait(states[place - 1])
    trained = jax.tree.unflatten(structure, leaves)
    counters = count((state.step, state.scale, state.finite_steps), finite)
    return TrainState(trained, tuple(states), *counters)
