"""AdamW, its schedules and its groups against formulas in numpy."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.config import OptimizerConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora.groups import group_labels
from qlora_jax.lora.variables import LoraB, LoraParam, LoraScale, LoraVector, Vector, Weight
from qlora_jax.models import trees
from qlora_jax.train.optimizer import adamw, schedule

pytestmark = pytest.mark.quick

MODELS = Path(__file__).parents[1] / "golden" / "models"
TREE = {
    "embed": Weight((6, 4)),
    "runs": {
        "0": {
            "q_proj": {"weight": Weight((2, 4, 4)), "bias": Vector((2, 4))},
            "up_proj": {"adapter": {"a": LoraParam((2, 4, 3)), "b": LoraB((2, 3, 5))}},
            "input_layernorm": {"weight": Vector((2, 4))},
        }
    },
    "norm": {"weight": Vector((4,))},
}


def rate(config: OptimizerConfig, steps: int, step: int) -> float:
    """Returns the documented learning rate at a step; steps count from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = min((step - config.warmup_steps) / (steps - config.warmup_steps), 1)
    shape = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }
    return config.learning_rate * shape[config.schedule]


def random_tree(seed: int) -> dict:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        TREE,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_schedules(name: str, warmup: int) -> None:
    config = OptimizerConfig(learning_rate=0.3, schedule=name, warmup_steps=warmup)
    found = [float(schedule(config, 20)(step)) for step in range(25)]
    expected = [rate(config, 20, step) for step in range(25)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert found[warmup] == pytest.approx(0.3)
    if warmup:
        assert found[0] == 0
    if name != "constant":
        assert found[20] == pytest.approx(0, abs=1e-8)
        assert found[19] > 0


def test_a_warm_up_longer_than_the_run() -> None:
    config = OptimizerConfig(learning_rate=0.3, schedule="cosine", warmup_steps=50)
    assert float(schedule(config, 20)(20)) == pytest.approx(0.3 * 20 / 50)


def test_against_adamw_in_numpy() -> None:
    config = OptimizerConfig(
        learning_rate=0.02,
        schedule="cosine",
        warmup_steps=2,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-3,
        weight_decay=0.3,
        lora_plus_ratio=4.0,
    )
    optimizer = adamw(config, 6)
    ours = random_tree(0)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    values = {path: np.asarray(x, np.float64) for path, x in trees.flatten(ours).items()}
    first = {path: np.zeros_like(x) for path, x in values.items()}
    second = {path: np.zeros_like(x) for path, x in values.items()}
    no_decay = ("bias", "norm.weight", "layernorm.weight")
    for step in range(5):
        grads = random_tree(step + 1)
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for path, g in trees.flatten(grads).items():
            g = np.asarray(g, np.float64)
            first[path] = 0.8 * first[path] + 0.2 * g
            second[path] = 0.95 * second[path] + 0.05 * g**2
            m = first[path] / (1 - 0.8 ** (step + 1))
            v = second[path] / (1 - 0.95 ** (step + 1))
            decay = 0.0 if path.endswith(no_decay) else 0.3
            lr = rate(config, 6, step) * (4 if path.endswith("adapter.b") else 1)
            values[path] = values[path] - lr * (m / (np.sqrt(v) + 1e-3) + decay * values[path])
    for path, x in trees.flatten(ours).items():
        np.testing.assert_allclose(x, values[path], rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_moves_b_by_a_multiple(ratio: float) -> None:
    config = OptimizerConfig(learning_rate=0.01, lora_plus_ratio=ratio)
    half = jnp.full((4, 4), 0.5)
    tree = {"adapter": {"a": LoraParam(half), "b": LoraB(half)}}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, -0.25), tree)
    optimizer = adamw(config, 10)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(tree), tree)
    # Adam's first update has the size of the learning rate.
    np.testing.assert_allclose(updates["adapter"]["a"], 0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["adapter"]["b"], 0.01 * ratio, rtol=1e-5)


def test_without_a_gradient_only_matrices_decay() -> None:
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    tree = random_tree(0)
    optimizer = adamw(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(tree), tree)
    after = trees.flatten(optax.apply_updates(tree, updates))
    for path, before in trees.flatten(tree).items():
        vector = path.endswith(("bias", "norm.weight", "layernorm.weight"))
        np.testing.assert_allclose(after[path], before * (1 if vector else 0.95), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_leaves_have_float32_moments_and_keep_their_dtype(dtype: str) -> None:
    ones = jnp.ones((4, 4), dtype)
    tree = {"adapter": {"a": LoraParam(ones), "b": LoraB(ones)}}
    optimizer = adamw(OptimizerConfig(learning_rate=0.125, beta2=0.999), 10)
    state = optimizer.init(tree)
    types = jax.tree.map(lambda x: x.dtype, (tree, state))
    update = jax.jit(optimizer.update)
    for size in (1.0, 1e-3, 1e-3, 1e-3):
        grads = jax.tree.map(lambda x, size=size: jnp.full(x.shape, size), tree)
        updates, state = update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        assert jax.tree.map(lambda x: x.dtype, (tree, state)) == types
    moments = [x for path, x in trees.flatten(state).items() if ".nu." in path]
    assert len(moments) == 2
    for moment in moments:
        np.testing.assert_allclose(moment, 1e-3 * 0.999**3 + 3e-9, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_groups_of_every_weight_of_a_model(name: str) -> None:
    model = load_model(open_folder(MODELS / name), quant=None, dtype=jnp.float32)
    state = nnx.state(model, Weight)
    weights, found = trees.flatten(state), trees.flatten(group_labels(state))
    assert len(weights) == {"llama": 12, "qwen2": 14}[name]
    for path, weight in weights.items():
        # leaves of the layers have one more axis, the layer
        axes = weight.ndim - path.startswith("runs.")
        assert found[path] == {1: "vector", 2: "matrix"}[axes], path


def test_groups_of_every_adapter_leaf(trainer) -> None:
    tree = trainer().trained
    found = group_labels(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert trees.flatten(found) == {
        f"runs.0.{name}.adapter.{leaf}": group
        for name in ("down_proj", "q_proj")
        for leaf, group in (("a", "matrix"), ("b", "b"))
    }


def test_every_leaf_is_in_a_group_that_is_updated() -> None:
    config = dataclasses.replace(OptimizerConfig(), learning_rate=0.1)
    tree = random_tree(0)
    optimizer = adamw(config, 10)
    updates, _ = jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)
    for path, update in trees.flatten(updates).items():
        np.testing.assert_allclose(np.abs(update), 0.1, rtol=1e-4, err_msg=path)


def test_groups_go_by_kind_whatever_a_path_says() -> None:
    tree = {
        "adapter": {"b": LoraParam(0), "a": LoraB(0), "magnitude": LoraVector(0)},
        "x": Vector(0),
    }
    found = trees.flatten(group_labels(tree))
    assert found == {
        "adapter.a": "b",
        "adapter.b": "matrix",
        "adapter.magnitude": "vector",
        "x": "vector",
    }


class NewKind(LoraParam):
    """A parameter kind that no group lists, derived from one that a group lists."""


@pytest.mark.parametrize("leaf", [NewKind(0), LoraScale(0), jnp.zeros(2)])
def test_a_leaf_of_an_unknown_kind_is_refused(leaf: Any) -> None:
    with pytest.raises(TypeError, match=f"^{type(leaf).__name__}: no optimizer group"):
        group_labels({"a": LoraParam(0), "adapter": {"b": leaf}})
