"""One training step over plain trees: a program for the gradient, then one for each unit's update.

The same code trains adapters on a 4-bit base, adapters on a 16-bit base, or every weight; they
differ in what is in `trained` and in `frozen`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.sharding import SPLIT, MeshLayout, added_up
from qlora_jax.runtime.mesh import ROWS, on_devices
from qlora_jax.train import layer_groups
from qlora_jax.train.loss import token_loss
from qlora_jax.train.offload import ON_DEVICE, Placement

GROWTH_INTERVAL = 2000
"""Finite steps after which the loss scale doubles; it halves at every overflow."""

INITIAL_SCALE = 2.0**15


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      trained: the trained tree.
      optimizer: the optimizer's state, one for each unit of the trained tree (`layer_groups`).
      step: int32[], steps taken, skipped ones included.
      scale: float32[], the loss scale; 1 and constant unless compute is float16.
      finite_steps: int32[], since the scale last changed.
    """

    trained: Any
    optimizer: Any
    step: jax.Array
    scale: jax.Array
    finite_steps: jax.Array


class Figures(NamedTuple):
    """What the gradient program reports.

    Attributes:
      loss: scalar, the mean over target tokens.
      tokens: scalar, their number.
      norm: scalar, the gradient's global norm before clipping.
      finite: scalar, whether loss and norm are finite.
      finite_leaves: bool[leaves of the trained tree], which gradients are; None where each was used
        as soon as it was there.
    """

    loss: jax.Array
    tokens: jax.Array
    norm: jax.Array
    finite: jax.Array
    finite_leaves: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the gradient and the evaluation are compiled for.

    Attributes:
      graph: the model's structure, from `trees.split`.
      compute_dtype: dtype of activations.
      remat: a key of `decoder.REMAT`.
      clip_norm: largest global gradient norm; 0 does not clip.
      method: a key of `trees.TRAINED`.
      layer_inputs: how the layers' inputs wait for the backward pass: exact, or int8.
      layout: how both trees are split over a mesh; None is one device.
    """

    graph: nnx.GraphDef
    compute_dtype: jnp.dtype
    remat: str
    clip_norm: float
    method: str
    layer_inputs: str = "exact"
    layout: MeshLayout | None = None

    def model(self, trained: Any, frozen: Any) -> Decoder:
        """Returns the model; inside `jax.shard_map` of this device's parts."""
        if self.layout is not None:
            trained, frozen = self.layout.in_parts(trained, frozen)
        return nnx.merge(self.graph, trained, frozen)


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """The compiled functions of a run.

    Attributes:
      recipe: what they are compiled for.
      gradient: (state, frozen, batch, key) to (gradients, Figures). Batch arrays are
        [k, B, T]; key is None without dropout. Gradients are unscaled and clipped; float32, except
        that a single micro-batch's are bfloat16 where what is trained is.
      update: (state, gradients, finite) to the next State; donates the state. Steps that are not
        finite leave trained and optimizer as they are. Where moments are on the host, those of at
        most three units are on the device.
      unit: what `update` runs for each unit: (group, its leaves, their gradients, index, moments,
        finite) to leaves and moments; donates both.
      count: (step, scale, finite_steps) and `finite` to the same after a step; donates them.
      evaluate: (trained, frozen, batch) to (loss sum, token count) of a batch [B, T].
      direct: (state, frozen, batch, key) to (the next State, Figures), where a step has no need of
        all gradients at one time; else None. It donates the state. A step that is not finite
        leaves a state that must not be used.
      parts: the compiled parts of a gradient that goes layer by layer (`layered`); else None.
    """

    recipe: Recipe
    gradient: Callable[..., tuple[Any, Figures]]
    update: Callable[..., TrainState]
    update_layer: Callable[..., tuple[Any, Any]]
    count: Callable[..., Any]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    direct: Callable[..., tuple[TrainState, Figures]] | None = None
    parts: Any = None


def gradient_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """In which dtype the gradient of a trained array is kept: bfloat16 has float32's range."""
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


def to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def init(
    trained: Any,
    optimizer: optax.GradientTransformation,
    dynamic_scale: bool,
    moments: Placement = ON_DEVICE,
    layout: MeshLayout | None = None,
) -> TrainState:
    """The state before the first step; moments are split over a mesh as what they are of."""
    scale = jnp.float32(INITIAL_SCALE if dynamic_scale else 1.0)
    # step and finite_steps need buffers of their own: both are donated
    step, finite_steps = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    if layout is not None:
        step, scale, finite_steps = layout.everywhere((step, scale, finite_steps))
    first = jax.jit(partial(init_unit, optimizer, layout))
    states = layer_groups.init_layers(trained, lambda unit: moments.store(first(unit)))
    return moments.begin(TrainState(trained, states, step, scale, finite_steps))


def init_unit(
    optimizer: optax.GradientTransformation, layout: MeshLayout | None, unit: Mapping[str, Any]
) -> Any:
    """Returns the optimizer's state of one unit before the first step."""
    state = optimizer.init(unit)
    return state if layout is None else split_moments(layout, unit, state)


def split_moments(layout: MeshLayout, unit: Mapping[str, Any], state: Any) -> Any:
    """Returns an optimizer's state of a unit, inside `jax.jit`, where it lives on the mesh."""
    return jax.lax.with_sharding_constraint(state, layout.moments(unit, state))


def build(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: jax.typing.DTypeLike,
    remat: str,
    clip_norm: float,
    method: str,
    layer_inputs: str = "exact",
    moments: Placement = ON_DEVICE,
    layout: MeshLayout | None = None,
) -> StepProgram:
    """Compiles lazily; see `StepProgram`.

    Args:
      graph: the model's structure, from `trees.split`.
      optimizer: leaf-wise transformation.
      compute_dtype: dtype of activations; float16 switches dynamic loss scaling on.
      remat: a key of `decoder.REMAT`.
      clip_norm: largest global gradient norm; 0 does not clip.
      method: a key of `trees.TRAINED`.
      layer_inputs: how the layers' inputs wait; the gradient in one program has no use for it.
      moments: where the optimizer's state lives.
      layout: how both trees are split over a mesh; None is one device.
    """
    dtype = jnp.dtype(compute_dtype)
    recipe = Recipe(graph, dtype, remat, clip_norm, method, layer_inputs, layout)
    # each program gets a function of its own, so that jax counts what is compiled for it alone
    unit = jax.jit(partial(update_unit, optimizer, layout), static_argnums=0, donate_argnums=(1, 4))
    counted = jax.jit(partial(count, dtype == jnp.float16), donate_argnums=0)
    return StepProgram(
        recipe=recipe,
        gradient=jax.jit(partial(gradient, recipe)),
        update=partial(update, unit, counted, moments),
        update_layer=unit,
        count=counted,
        evaluate=jax.jit(partial(evaluate, recipe)),
    )


def loss_sum(
    recipe: Recipe,
    trained: Any,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
    remat: str,
) -> tuple[jax.Array, jax.Array]:
    """Returns the summed loss of a batch [B, T] and the number of its target tokens."""
    model = recipe.model(trained, frozen)
    hidden = model.hidden(
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        dtype=recipe.compute_dtype,
        remat=remat,
        key=key,
    )
    return loss_of(recipe, model, hidden, batch, key)


def loss_of(
    recipe: Recipe,
    model: Decoder,
    hidden: jax.Array,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the summed loss over the model's output [B, T, hidden], and its target tokens."""
    head, axis = model.stored_head()
    return token_loss(
        hidden,
        head,
        batch["targets"],
        batch["mask"],
        vocab_axis=axis,
        train_head=recipe.method == "full",
        softcap=model.config.final_softcap,
        update=model.head_update(hidden, key),
    )


def evaluate(
    recipe: Recipe, trained: Any, frozen: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss sum and the token count of a batch: `StepProgram.evaluate`."""

    def sums(trained: Any, frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        found = loss_sum(recipe, trained, frozen, batch, None, "none")
        return found if recipe.layout is None else jax.lax.psum(found, ROWS)

    if recipe.layout is None:
        return sums(trained, frozen, dict(batch))
    mine = recipe.layout.specs(trained, frozen)
    return on_devices(recipe.layout.mesh, sums, (*mine, SPLIT), P())(trained, frozen, dict(batch))


def gradient(
    recipe: Recipe,
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[Any, Figures]:
    """Returns the gradients of the trained tree, and figures: `StepProgram.gradient`.

    The frozen tree takes no gradient because the loss is differentiated with respect to the
    trained tree alone.
    """
    count, factor = factor_of(state.scale, batch["mask"])
    one: Callable[..., tuple[Any, jax.Array]] = partial(_micro_gradient, recipe)
    if recipe.layout is not None:
        trees = recipe.layout.specs(state.trained, frozen)
        rows = (trees[1], P(), trees[0], SPLIT, SPLIT)
        one = on_devices(recipe.layout.mesh, one, rows, (trees[0], P()))
    micro = partial(one, frozen, factor)
    k = batch["mask"].shape[0]
    # a key for each row, so that what is dropped in it does not depend on the device it is on
    keys = None if key is None else jax.random.split(key, batch["mask"].shape[:2])
    if k == 1:
        grads, total = micro(state.trained, *jax.tree.map(lambda x: x[0], (dict(batch), keys)))
    else:
        grads, total = _accumulated(micro, state.trained, dict(batch), keys)
    return clipped(recipe.clip_norm, grads, total, count, state.scale)


def factor_of(scale: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the number of target tokens of all micro-batches, and the factor on their loss sum.

    The number is known before any loss, so every micro-batch divides by it once, and k of them
    add up to one large batch.

    Args:
      scale: the loss scale.
      mask: bool[k, B, T].
    """
    count = mask.sum().astype(jnp.float32)
    return count, scale / jnp.maximum(count, 1)


def clipped(
    clip_norm: float, grads: Any, total: jax.Array, count: jax.Array, scale: jax.Array
) -> tuple[Any, Figures]:
    """Returns gradients, unscaled and clipped, and the step's figures.

    Args:
      clip_norm: as in `Recipe`.
      grads: of the scaled loss.
      total: the summed loss.
      count: of target tokens.
      scale: the loss scale.
    """
    squares = jnp.stack([jnp.sum(to_float32(g) ** 2) for g in jax.tree.leaves(grads)])
    norm = jnp.sqrt(squares.sum()) / scale
    shrink = shrink_of(clip_norm, norm) if clip_norm else 1.0
    grads = jax.tree.map(
        lambda g: (to_float32(g) * (shrink / scale)).astype(gradient_dtype(g.dtype)), grads
    )
    figures = figures_of(total, count, norm)
    return grads, figures._replace(finite_leaves=jnp.isfinite(squares))


def shrink_of(clip_norm: float, norm: jax.Array) -> jax.Array:
    """Returns the factor that makes gradients of this norm no larger than `clip_norm`."""
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))


def figures_of(total: jax.Array, count: jax.Array, norm: jax.Array) -> Figures:
    """Returns a step's figures from the summed loss, its tokens and the gradient's norm."""
    loss = total / jnp.maximum(count, 1)
    return Figures(loss, count, norm, jnp.isfinite(loss) & jnp.isfinite(norm))


def _micro_gradient(
    recipe: Recipe,
    frozen: Any,
    factor: jax.Array,
    trained: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """Returns the gradient of `factor` times the summed loss of a batch [B, T], and that sum."""

    def scaled(trained: Any) -> tuple[jax.Array, jax.Array]:
        total, _ = loss_sum(recipe, trained, frozen, batch, key, recipe.remat)
        return total * factor, total

    (_, total), grads = jax.value_and_grad(scaled, has_aux=True)(trained)
    if recipe.layout is not None:
        return added_up(grads, recipe.layout.trained), jax.lax.psum(total, ROWS)
    return grads, total


def _accumulated(
    micro: Callable[..., tuple[Any, jax.Array]],
    trained: Any,
    batch: Mapping[str, jax.Array],
    keys: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """Returns the sums over micro-batches [k, B, T] of what `micro` gives, in float32."""

    def add(carry: Any, xs: Any) -> tuple[Any, None]:
        grads, total = micro(trained, *xs)
        return jax.tree.map(jnp.add, carry, (jax.tree.map(to_float32, grads), total)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    return jax.lax.scan(add, (zeros, jnp.float32(0)), (batch, keys))[0]


def update_unit(
    optimizer: optax.GradientTransformation,
    layout: MeshLayout | None,
    group: layer_groups.LayerGroup,
    leaves: Sequence[jax.Array],
    grads: Sequence[jax.Array],
    index: jax.Array,
    moments: Any,
    finite: jax.Array,
) -> tuple[Sequence[jax.Array], Any]:
    """Updates one unit of a group, unless the gradient is not finite: `StepProgram.update_layer`.

    The gradients are stacks of all layers', or of this layer's alone.
    """
    params = layer_groups.take_layer(group, leaves, index)
    slopes = layer_groups.take_layer(group, grads, jnp.minimum(index, grads[0].shape[0] - 1))
    updates, new = optimizer.update(slopes, moments, params)
    moved = optax.apply_updates(params, updates)
    moved, new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (moved, new), (params, moments))
    if layout is not None:
        new = split_moments(layout, params, new)
    return layer_groups.put_layer(group, leaves, index, moved), new


def count(dynamic_scale: bool, counters: Any, finite: jax.Array) -> Any:
    """Returns a State's step, scale and finite_steps after a step."""
    step, scale, finite_steps = counters
    if dynamic_scale:
        finite_steps = jnp.where(finite, finite_steps + 1, 0)
        grown = finite_steps >= GROWTH_INTERVAL
        scale = jnp.where(finite, jnp.where(grown, scale * 2, scale), jnp.maximum(scale / 2, 1))
        finite_steps = jnp.where(grown, 0, finite_steps)
    return step + 1, scale, finite_steps


def update(
    unit: Callable[..., tuple[Sequence[jax.Array], Any]],
    count: Callable[..., Any],
    moments: Placement,
    state: TrainState,
    grads: Any,
    finite: jax.Array,
) -> TrainState:
    """Updates every unit, one after another, and counts the step: `StepProgram.update`.

    Args:
      unit: the compiled `update_unit`.
      count: the compiled `count`.
      moments: where the optimizer's state lives; a unit's comes while the one before is updated.
      state: donated.
      grads: gradients of the trained tree.
      finite: bool scalar; without it trained and optimizer stay as they are.
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
        new, own = unit(
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
