"""Freezing the base by a mask trains the same adapters as a gradient without the base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora import LoraParam, choose_adapters, masks
from qlora_jax.models import trees
from qlora_jax.models.decoder import Decoder, attach
from qlora_jax.quant import QTensor
from qlora_jax.train.step import Recipe, loss_sum

STEPS = 6
LIMIT = 1.2
"""Clip norm of the adapters' gradient; some steps exceed it and some do not."""

TOKENS = jnp.arange(33, dtype=jnp.int32)
BATCH = {
    "tokens": TOKENS[:-1].reshape(2, 16),
    "targets": TOKENS[1:].reshape(2, 16),
    "segments": jnp.ones((2, 16), jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(16), (2, 16)),
    "mask": jnp.ones((2, 16), bool),
}
CONFIG = LoraConfig(
    rank=4, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 2}
)


@pytest.fixture
def model(models: Path) -> Decoder:
    """A llama of three layers in bfloat16, with DoRA adapters in float32."""
    return adapted(models, None)


def adapted(models: Path, quant: QuantConfig | None) -> Decoder:
    made = load_model(open_folder(models / "llama"), quant=quant, dtype=jnp.bfloat16)
    attach(made, choose_adapters(CONFIG, made.linears()), jax.random.key(0), variant="dora")
    return made


def tuned() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(LIMIT), optax.adamw(0.02, weight_decay=0.1))


def by_labels(tree: Any) -> optax.GradientTransformation:
    groups = {masks.TRAIN: tuned(), masks.FREEZE: optax.set_to_zero()}
    return optax.partition(groups, masks.labels(tree))


def loss_of(graph: nnx.GraphDef, head: bool) -> Callable[[Any, Any], jax.Array]:
    """Returns the batch's mean loss as a function of two parts of a model's state.

    Args:
      graph: structure of the model.
      head: true if the head gets a gradient.
    """
    recipe = Recipe(graph, jnp.dtype(jnp.bfloat16), "none", 0.0, "full" if head else "qlora")

    def loss(some: Any, others: Any) -> jax.Array:
        total, count = loss_sum(recipe, some, others, BATCH, None, "none")
        return total / count

    return loss


class Trained(NamedTuple):
    """The differentiated tree after the last step, and the norm of each adapter gradient."""

    tree: Any
    norms: list[float]


def train(loss: Callable[..., jax.Array], tree: Any, rest: Any, optimizer: Any) -> Trained:
    """Trains for STEPS steps: differentiates all of `tree` and updates all of it."""
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(optimizer.update)
    apply, state, norms = jax.jit(optax.apply_updates), optimizer.init(tree), []
    for _ in range(STEPS):
        grads = gradient(tree, rest)
        norms.append(float(optax.tree.norm(adapters(grads))))
        updates, state = update(grads, state, tree)
        tree = apply(tree, updates)
    return Trained(tree, norms)


def adapters(tree: Any) -> Any:
    return nnx.filter_state(tree, LoraParam)


def base(tree: Any) -> Any:
    return nnx.filter_state(tree, nnx.filterlib.Not(LoraParam))


def content(tree: Any) -> dict[str, bytes]:
    return {path: np.asarray(x).tobytes() for path, x in trees.flatten(tree).items()}


@pytest.mark.quick
def test_both_ways_give_the_same_adapters_and_leave_the_base(model: Decoder) -> None:
    graph, trained, frozen = trees.split(model, "lora")
    whole, state = nnx.split(model)
    ours = train(loss_of(graph, False), trained, frozen, tuned())
    theirs = train(loss_of(whole, True), state, nnx.State({}), by_labels(state))
    assert ours.norms == theirs.norms
    assert min(ours.norms) < LIMIT < max(ours.norms)
    assert content(ours.tree) == content(adapters(theirs.tree))
    assert content(base(theirs.tree)) == content(frozen)
    before, after = content(trained), content(ours.tree)
    assert {path.rpartition(".")[2] for path in before} == {"a", "b", "magnitude"}
    assert all(before[path] != after[path] for path in before)


@pytest.mark.slow
@pytest.mark.quick
def test_a_mask_alone_does_not_freeze(model: Decoder) -> None:
    graph, state = nnx.split(model)
    grads = jax.jit(jax.grad(loss_of(graph, True)))(state, nnx.State({}))
    optimizer = optax.masked(tuned(), masks.trainable_mask(state))
    updates, _ = optimizer.update(grads, optimizer.init(state), state)
    assert content(base(updates)) == content(base(grads))
    moved = trees.flatten(base(optax.apply_updates(state, updates)))
    for path in ("embed", "head", "norm.weight", "runs.0.q_proj.weight"):
        assert (moved[path] != trees.flatten(state)[path]).any(), path


@pytest.mark.quick
def test_what_the_mask_says(model: Decoder) -> None:
    _, state = nnx.split(model)
    for tree in (state, model):
        mask, flat = masks.trainable_mask(tree), trees.flatten(masks.trainable_mask(state))
        assert jax.tree.structure(mask) == jax.tree.structure(tree)
        assert jax.tree.leaves(mask) == list(flat.values())
        assert [path for path, trained in flat.items() if trained] == [
            f"runs.0.{linear}.adapter.{name}"
            for linear in ("down_proj", "q_proj")
            for name in ("a", "b", "magnitude")
        ]
        names = {True: masks.TRAIN, False: masks.FREEZE}
        assert jax.tree.leaves(masks.labels(tree)) == [names[x] for x in flat.values()]


@pytest.mark.quick
def test_a_quantized_base_has_no_gradient(models: Path) -> None:
    graph, state = nnx.split(adapted(models, QuantConfig()))
    weights = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QTensor))
    assert any(isinstance(x, QTensor) for x in weights)
    with pytest.raises(TypeError, match=r"grad requires real.*uint8"):
        jax.grad(loss_of(graph, True))(state, nnx.State({}))
    assert sum(jax.tree.leaves(masks.trainable_mask(state))) == 6
