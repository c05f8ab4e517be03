"""The compiled programs of a gradient that is computed layer by layer; `layered` runs them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.inputs import LayerInputs, SharedInputs
from qlora_jax.models.trees import TRAINED
from qlora_jax.quant.dynamic8 import decode8, encode8
from qlora_jax.quant.stack import layer_of
from qlora_jax.train import layer_groups
from qlora_jax.train.step import (
    Figures,
    Recipe,
    clipped,
    factor_of,
    gradient_dtype,
    loss_of,
    shrink_of,
    to_float32,
)

Leaves = Sequence[jax.Array]
Batch = Mapping[str, jax.Array]


class Trees(NamedTuple):
    """The structures of a model's two trees; hashable, so jit takes them as a static argument."""

    trained: jax.tree_util.PyTreeDef
    frozen: jax.tree_util.PyTreeDef


class LayeredModel(NamedTuple):
    """The leaves of a model's two trees; jit handles lists of leaves faster than `nnx.State`s."""

    trained: Leaves
    frozen: Leaves


class LayerPrograms(NamedTuple):
    """The compiled programs of a gradient. `trees` and `place` (index of a run) are static.

    Attributes:
      begin: (scale, mask [k, B, T]) -> number of target tokens, factor on the loss.
      enter: (trees, model, batch, key) -> input of the first layer, inputs that all layers share,
        and a stack of the inputs that each layer has for itself.
      forward: (trees, place, model, index in the run, x, shared, own) -> output of the layer.
      top: (trees, model, x, batch, key, factor) -> loss sum, gradient of x, and gradients of the
        trained leaves outside the layers; donates x.
      backward: (trees, place, model, index in the run, x, g, shared, own) -> gradient of x, and
        gradients of the layer's trained leaves [1, ...]; donates g.
      bottom: (trees, model, batch, g) -> gradients of the trained leaves outside the layers, with g
        the gradient of the first layer's input.
      zeros: (True for one micro-batch, leaves) -> zeros in the shapes of the leaves, for the sums
        of gradients: in the gradients' dtypes for one micro-batch, else in float32.
      add: (sums, gradients, index) -> sums with the gradients added; donates the sums.
      finish: (sums, loss sum, count, scale) -> gradients and figures; donates the sums.
      pack: (layer input) -> stored form of the input, for the backward pass.
      unpack: (stored form) -> layer input.
      squares: (squared norm, gradients) -> squared norm plus that of the gradients, and whether
        the sum is finite.
      shrink: (squared norm) -> factor that clips the gradients.
      scaled: (gradients, factor) -> gradients times the factor; donates the gradients.
    """

    begin: Callable[..., Any]
    enter: Callable[..., Any]
    forward: Callable[..., Any]
    top: Callable[..., Any]
    backward: Callable[..., Any]
    bottom: Callable[..., Any]
    zeros: Callable[..., Any]
    add: Callable[..., Any]
    finish: Callable[..., Any]
    pack: Callable[[jax.Array], Any]
    unpack: Callable[[Any], jax.Array]
    squares: Callable[..., Any]
    shrink: Callable[..., Any]
    scaled: Callable[..., Any]


def compiled(recipe: Recipe) -> LayerPrograms:
    """Builds the gradient programs; jax compiles each program at its first call."""
    pack, unpack = _same, _same
    if recipe.layer_inputs == "int8":
        pack = jax.jit(lambda x: encode8(to_float32(x)))
        unpack = jax.jit(lambda packed: decode8(packed).astype(recipe.compute_dtype))
    return LayerPrograms(
        begin=jax.jit(factor_of),
        enter=jax.jit(partial(_enter, recipe), static_argnums=0),
        forward=jax.jit(partial(_layer, recipe), static_argnums=(0, 1)),
        top=jax.jit(partial(_top, recipe), static_argnums=0, donate_argnums=2),
        backward=jax.jit(partial(_backward, recipe), static_argnums=(0, 1), donate_argnums=5),
        bottom=jax.jit(partial(_bottom, recipe), static_argnums=0),
        zeros=jax.jit(_zeros, static_argnums=0),
        add=jax.jit(_add, donate_argnums=0),
        finish=jax.jit(partial(_finish, recipe), donate_argnums=0),
        pack=pack,
        unpack=unpack,
        squares=jax.jit(_squares),
        shrink=jax.jit(lambda square: shrink_of(recipe.clip_norm, jnp.sqrt(square))),
        scaled=jax.jit(_scaled, donate_argnums=0),
    )


def _same(x: Any) -> Any:
    return x


def _decoder(recipe: Recipe, trees: Trees, model: LayeredModel) -> Decoder:
    trained = jax.tree.unflatten(trees.trained, model.trained)
    return nnx.merge(recipe.graph, trained, jax.tree.unflatten(trees.frozen, model.frozen))


def _enter(
    recipe: Recipe, trees: Trees, model: LayeredModel, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, SharedInputs, LayerInputs]:
    decoder = _decoder(recipe, trees, model)
    tokens, segments, positions = (batch[name] for name in ("tokens", "segments", "positions"))
    return decoder.layer_inputs(tokens, segments, positions, recipe.compute_dtype, key)


def _layer(
    recipe: Recipe,
    trees: Trees,
    place: int,
    model: LayeredModel,
    index: jax.Array,
    x: jax.Array,
    shared: SharedInputs,
    own: LayerInputs,
) -> jax.Array:
    decoder = _decoder(recipe, trees, model)
    graph, weights = nnx.split(decoder.runs[place])
    weights, own = layer_of((weights, decoder.part(own, place)), index)
    return nnx.merge(graph, weights)(x, shared, own)[0]


def _backward(
    recipe: Recipe,
    trees: Trees,
    place: int,
    model: LayeredModel,
    index: jax.Array,
    x: jax.Array,
    g: jax.Array,
    shared: SharedInputs,
    own: LayerInputs,
) -> tuple[jax.Array, list[jax.Array]]:
    decoder = _decoder(recipe, trees, model)
    graph, *states = nnx.split(decoder.runs[place], TRAINED[recipe.method], ...)
    (trained, frozen), own = layer_of((states, decoder.part(own, place)), index)

    def layer(trained: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, trained, frozen)(x, shared, own, recompute=True)[0]

    grads, g = jax.vjp(layer, trained, x)[1](g)
    return g, [leaf[None] for leaf in jax.tree.leaves(grads)]


def _top(
    recipe: Recipe,
    trees: Trees,
    model: LayeredModel,
    x: jax.Array,
    batch: Batch,
    key: jax.Array | None,
    factor: jax.Array,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    def scaled(outer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoder = _decoder(recipe, trees, _with_outer(trees, model, outer))
        total, _ = loss_of(recipe, decoder, decoder.norm(x), batch, key)
        return total * factor, total

    outer = [model.trained[p] for p in _outer(trees, model)]
    (_, total), (grads, g) = jax.value_and_grad(scaled, (0, 1), has_aux=True)(outer, x)
    return total, g, grads


def _bottom(
    recipe: Recipe, trees: Trees, model: LayeredModel, batch: Batch, g: jax.Array
) -> list[jax.Array]:
    def entered(outer: Any) -> jax.Array:
        return _enter(recipe, trees, _with_outer(trees, model, outer), batch, None)[0]

    outer = [model.trained[p] for p in _outer(trees, model)]
    return jax.vjp(entered, outer)[1](g)[0]


def _outer(trees: Trees, model: LayeredModel) -> list[int]:
    """Returns the indices of the trained leaves outside the layers."""
    groups = layer_groups.find_groups(jax.tree.unflatten(trees.trained, model.trained))
    return [place for group in groups if group.run is None for place in group.places]


def _with_outer(trees: Trees, model: LayeredModel, outer: Leaves) -> LayeredModel:
    """Returns the model with its trained leaves outside the layers replaced by `outer`."""
    leaves = list(model.trained)
    for place, leaf in zip(_outer(trees, model), outer):
        leaves[place] = leaf
    return LayeredModel(leaves, model.frozen)


def _zeros(single: bool, leaves: Leaves) -> list[jax.Array]:
    dtypes = [gradient_dtype(x.dtype) if single else jnp.dtype(jnp.float32) for x in leaves]
    return [jnp.zeros(x.shape, dtype) for x, dtype in zip(leaves, dtypes)]


def _add(sums: Leaves, grads: Leaves, index: jax.Array) -> list[jax.Array]:
    def added(total: jax.Array, g: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_slice_in_dim(total, index, g.shape[0])
        new = old + g.astype(total.dtype)
        return jax.lax.dynamic_update_slice_in_dim(total, new, index, 0)

    return [added(total, g) for total, g in zip(sums, grads)]


def _finish(
    recipe: Recipe, sums: Leaves, total: jax.Array, count: jax.Array, scale: jax.Array
) -> tuple[Any, Figures]:
    return clipped(recipe.clip_norm, sums, total, count, scale)


def _squares(square: jax.Array, grads: Leaves) -> tuple[jax.Array, jax.Array]:
    square += sum(jnp.sum(to_float32(g) ** 2) for g in grads)
    return square, jnp.isfinite(square)


def _scaled(grads: Leaves, factor: jax.Array) -> list[jax.Array]:
    return [(to_float32(g) * factor).astype(g.dtype) for g in grads]
