"""One training step as two programs over plain trees: the gradient, then the update.

The same code trains adapters on a 4-bit base, adapters on a 16-bit base, or every weight; they
differ in what is in `trained` and in `frozen`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlora_jax.models.decoder import Decoder
from qlora_jax.train.loss import token_loss

GROWTH_INTERVAL = 2000
"""Finite steps after which the loss scale doubles; it halves at every overflow."""

INITIAL_SCALE = 2.0**15


class State(NamedTuple):
    """What a step changes.

    Attributes:
      trained: the trained tree.
      optimizer: the optimizer's state.
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
    """What the gradient program reports, all scalars.

    `loss` is the mean over target tokens, `norm` the gradient's global norm before clipping,
    `finite` whether both are finite.
    """

    loss: jax.Array
    tokens: jax.Array
    norm: jax.Array
    finite: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run.

    Attributes:
      gradient: (state, frozen, batch, key) to (gradients, Figures). Batch arrays are
        [k, B, T]; key is None without dropout. Gradients are float32, unscaled and clipped.
      update: (state, gradients, finite) to the next State; donates the state. Steps that are not
        finite leave trained and optimizer as they are.
      evaluate: (trained, frozen, batch) to (loss sum, token count) of a batch [B, T].
    """

    gradient: Callable[..., tuple[Any, Figures]]
    update: Callable[..., State]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


def init(trained: Any, optimizer: optax.GradientTransformation, dynamic_scale: bool) -> State:
    """The state before the first step."""
    scale = jnp.float32(INITIAL_SCALE if dynamic_scale else 1.0)
    # step and finite_steps need buffers of their own: both are donated
    step, finite_steps = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return State(trained, optimizer.init(trained), step, scale, finite_steps)


def build(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: jax.typing.DTypeLike,
    remat: str,
    clip_norm: float,
    train_head: bool,
) -> Program:
    """Compiles lazily; see `Program`.

    Args:
      graph: the model's structure, from `trees.split`.
      optimizer: leaf-wise transformation.
      compute_dtype: of activations; float16 switches dynamic loss scaling on.
      remat: a key of `decoder.REMAT`.
      clip_norm: largest global gradient norm; 0 does not clip.
      train_head: whether the head (or the embedding tied to it) is trained.
    """

    def loss_sum(
        trained: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array | None, remat: str
    ) -> tuple[jax.Array, jax.Array]:
        model: Decoder = nnx.merge(graph, trained, frozen)
        hidden = model.hidden(
            batch["tokens"],
            batch["segments"],
            batch["positions"],
            dtype=compute_dtype,
            remat=remat,
            key=key,
        )
        head, axis = model.stored_head()
        return token_loss(
            hidden, head, batch["targets"], batch["mask"], vocab_axis=axis, train_head=train_head
        )

    @jax.jit
    def gradient(
        state: State, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[Any, Figures]:
        # The count of the whole batch is known before any loss, so every micro-batch divides by
        # it once and k of them add up to one large batch.
        count = batch["mask"].sum().astype(jnp.float32)
        factor = state.scale / jnp.maximum(count, 1)

        def micro(trained: Any, micro_batch: Any, micro_key: jax.Array | None) -> Any:
            def scaled(trained: Any) -> tuple[jax.Array, jax.Array]:
                total, _ = loss_sum(trained, frozen, micro_batch, micro_key, remat)
                return total * factor, total

            (_, total), grads = jax.value_and_grad(scaled, has_aux=True)(trained)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), total

        k = batch["mask"].shape[0]
        keys = None if key is None else jax.random.split(key, k)
        if k == 1:
            grads, total = micro(state.trained, *jax.tree.map(lambda x: x[0], (dict(batch), keys)))
        else:

            def add(carry: Any, xs: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, micro(state.trained, *xs)), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trained)
            (grads, total), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), (dict(batch), keys))
        grads = jax.tree.map(lambda g: g / state.scale, grads)
        norm = optax.tree.norm(grads)
        loss = total / jnp.maximum(count, 1)
        if clip_norm:
            shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        return grads, Figures(loss, count, norm, jnp.isfinite(loss) & jnp.isfinite(norm))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, grads: Any, finite: jax.Array) -> State:
        def apply() -> tuple[Any, Any]:
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
            return optax.apply_updates(state.trained, updates), optimizer_state

        trained, optimizer_state = jax.lax.cond(
            finite, apply, lambda: (state.trained, state.optimizer)
        )
        scale, finite_steps = state.scale, state.finite_steps
        if compute_dtype == jnp.float16:
            finite_steps = jnp.where(finite, finite_steps + 1, 0)
            grown = finite_steps >= GROWTH_INTERVAL
            scale = jnp.where(finite, jnp.where(grown, scale * 2, scale), jnp.maximum(scale / 2, 1))
            finite_steps = jnp.where(grown, 0, finite_steps)
        return State(trained, optimizer_state, state.step + 1, scale, finite_steps)

    @jax.jit
    def evaluate(
        trained: Any, frozen: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return loss_sum(trained, frozen, batch, None, "none")

    return Program(gradient, update, evaluate)
