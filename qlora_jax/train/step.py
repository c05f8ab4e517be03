"""One training step over plain trees: one program computes the gradient, others update each layer.

The same code trains adapters on a 4-bit base, adapters on a 16-bit base, or every weight. The
methods differ only in which variables are in the tree `trained` and which are in `frozen`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.sharding import SPLIT, MeshLayout, sum_gradients
from qlora_jax.runtime.mesh import ROWS, on_devices
from qlora_jax.train.loss import token_loss
from qlora_jax.train.offload import ON_DEVICE, Placement
from qlora_jax.train.state import TrainState, count_step, update_all_layers, update_layer


class Figures(NamedTuple):
    """Scalars that the gradient program returns beside the gradients.

    Attributes:
      loss: scalar, mean loss over the target tokens.
      tokens: scalar, number of target tokens.
      norm: scalar, global norm of the gradient before clipping.
      finite: scalar, True if loss and norm are finite.
      finite_leaves: bool[leaves of the trained tree], True for each leaf with a finite gradient;
        None if the step updated each layer at once (`StepProgram.direct`).
    """

    loss: jax.Array
    tokens: jax.Array
    norm: jax.Array
    finite: jax.Array
    finite_leaves: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The constants with which the gradient and the evaluation are compiled.

    Attributes:
      graph: structure of the model, from `trees.split`.
      compute_dtype: dtype of the activations.
      remat: key of `decoder.REMAT`.
      clip_norm: largest global gradient norm; 0 disables clipping.
      method: key of `trees.TRAINED`.
      layer_inputs: format in which layer inputs are stored for the backward pass: exact or int8.
      layout: split of both trees over a mesh; None for one device.
    """

    graph: nnx.GraphDef
    compute_dtype: jnp.dtype
    remat: str
    clip_norm: float
    method: str
    layer_inputs: str = "exact"
    layout: MeshLayout | None = None

    def model(self, trained: Any, frozen: Any) -> Decoder:
        """Returns the model; inside `jax.shard_map`, the model of this device's shards."""
        if self.layout is not None:
            trained, frozen = self.layout.local_parts(trained, frozen)
        return nnx.merge(self.graph, trained, frozen)


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """The compiled functions of one training run.

    Attributes:
      recipe: constants with which the functions are compiled.
      gradient: function (state, frozen, batch, key) -> (gradients, Figures). Batch arrays are
        [k, B, T], k micro-batches; key is None without dropout. The gradients are unscaled and
        clipped. They are float32; with k = 1, the gradients of bfloat16 leaves are bfloat16.
      update: function (state, gradients, finite) -> next TrainState; donates the state. If the
        step is not finite, trained and optimizer do not change. If moments live on the host, the
        device holds the moments of at most three layers at a time.
      update_layer: function that `update` calls for each layer: (group, leaves, gradients, index,
        moments, finite) -> (leaves, moments); donates leaves and moments.
      count: function ((step, scale, finite_steps), finite) -> the three values after the step;
        donates the three values.
      evaluate: function (trained, frozen, batch) -> (loss sum, token count), for a batch [B, T].
      direct: function (state, frozen, batch, key) -> (next TrainState, Figures) that updates each
        layer as soon as its gradients exist; donates the state. None if the gradient is one
        program, or if a step needs all gradients before the first update. After a step that is not
        finite, the state must not be used.
      layer_programs: compiled gradient programs that run layer by layer (`layered`); None if the
        gradient is one program.
    """

    recipe: Recipe
    gradient: Callable[..., tuple[Any, Figures]]
    update: Callable[..., TrainState]
    update_layer: Callable[..., tuple[Any, Any]]
    count: Callable[..., Any]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    direct: Callable[..., tuple[TrainState, Figures]] | None = None
    layer_programs: Any = None


def gradient_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype in which the gradient of a trained array is stored.

    bfloat16 arrays keep bfloat16 gradients, because bfloat16 has the range of float32.
    """
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


def to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


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
    """Builds the functions of a step; jax compiles each function at its first call.

    Args:
      graph: structure of the model, from `trees.split`.
      optimizer: transformation that updates each leaf independently.
      compute_dtype: dtype of the activations; float16 enables dynamic loss scaling.
      remat: key of `decoder.REMAT`.
      clip_norm: largest global gradient norm; 0 disables clipping.
      method: key of `trees.TRAINED`.
      layer_inputs: format of stored layer inputs; only a gradient that runs layer by layer uses it.
      moments: placement of the optimizer state.
      layout: split of both trees over a mesh; None for one device.
    """
    dtype = jnp.dtype(compute_dtype)
    recipe = Recipe(graph, dtype, remat, clip_norm, method, layer_inputs, layout)
    # a new `partial` for each program, so that jax counts each program's compilations separately
    one_layer = partial(update_layer, optimizer, layout)
    updated = jax.jit(one_layer, static_argnums=0, donate_argnums=(1, 4))
    counted = jax.jit(partial(count_step, dtype == jnp.float16), donate_argnums=0)
    return StepProgram(
        recipe=recipe,
        gradient=jax.jit(partial(gradient, recipe)),
        update=partial(update_all_layers, updated, counted, moments),
        update_layer=updated,
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
    """Returns the summed loss of a batch [B, T] and the number of target tokens."""
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
    """Returns the summed loss of hidden states [B, T, hidden] and the number of target tokens."""
    head, axis = model.stored_head()
    return token_loss(
        hidden,
        head,
        batch["targets"],
        batch["mask"],
        vocab_axis=axis,
        train_head=recipe.method == "full",
        softcap=model.config.final_softcap,
        update=model.head_delta(hidden, key),
    )


def evaluate(
    recipe: Recipe, trained: Any, frozen: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss sum and the token count of a batch; see `StepProgram.evaluate`."""

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
    """Returns the gradients of the trained tree and the figures; see `StepProgram.gradient`.

    The frozen tree has no gradient, because the loss is differentiated with respect to the
    trained tree only.
    """
    count, factor = factor_of(state.scale, batch["mask"])
    one: Callable[..., tuple[Any, jax.Array]] = partial(_micro_gradient, recipe)
    if recipe.layout is not None:
        trees = recipe.layout.specs(state.trained, frozen)
        rows = (trees[1], P(), trees[0], SPLIT, SPLIT)
        one = on_devices(recipe.layout.mesh, one, rows, (trees[0], P()))
    micro = partial(one, frozen, factor)
    k = batch["mask"].shape[0]
    # one key for each row, so that a row's dropout does not depend on the device that holds it
    keys = None if key is None else jax.random.split(key, batch["mask"].shape[:2])
    if k == 1:
        grads, total = micro(state.trained, *jax.tree.map(lambda x: x[0], (dict(batch), keys)))
    else:
        grads, total = _accumulated(micro, state.trained, dict(batch), keys)
    return clipped(recipe.clip_norm, grads, total, count, state.scale)


def factor_of(scale: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the number of targets of all micro-batches, and scale / number, the loss's factor.

    The number of tokens is known before any loss is computed. So each micro-batch divides its loss
    by the tokens of all k micro-batches, and the k gradients add up to that of one large batch.

    Args:
      scale: loss scale.
      mask: bool[k, B, T], True at positions with a target.
    """
    count = mask.sum().astype(jnp.float32)
    return count, scale / jnp.maximum(count, 1)


def clipped(
    clip_norm: float, grads: Any, total: jax.Array, count: jax.Array, scale: jax.Array
) -> tuple[Any, Figures]:
    """Returns the unscaled, clipped gradients and the figures of the step.

    Args:
      clip_norm: largest global gradient norm; 0 disables clipping.
      grads: gradients of the scaled loss.
      total: summed loss.
      count: number of target tokens.
      scale: loss scale.
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
    """Returns the factor that limits gradients with this norm to `clip_norm`."""
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))


def figures_of(total: jax.Array, count: jax.Array, norm: jax.Array) -> Figures:
    """Returns the figures of a step, from the loss sum, the target tokens and the gradient norm."""
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
    """Returns the gradient of factor · (loss sum) for a batch [B, T], and the loss sum."""

    def scaled(trained: Any) -> tuple[jax.Array, jax.Array]:
        total, _ = loss_sum(recipe, trained, frozen, batch, key, recipe.remat)
        return total * factor, total

    (_, total), grads = jax.value_and_grad(scaled, has_aux=True)(trained)
    if recipe.layout is not None:
        return sum_gradients(grads, recipe.layout.trained), jax.lax.psum(total, ROWS)
    return grads, total


def _accumulated(
    micro: Callable[..., tuple[Any, jax.Array]],
    trained: Any,
    batch: Mapping[str, jax.Array],
    keys: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """Returns the results of `micro` in float32, summed over the micro-batches [k, B, T]."""

    def add(carry: Any, xs: Any) -> tuple[Any, None]:
        grads, total = micro(trained, *xs)
        return jax.tree.map(jnp.add, carry, (jax.tree.map(to_float32, grads), total)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    return jax.lax.scan(add, (zeros, jnp.float32(0)), (batch, keys))[0]
