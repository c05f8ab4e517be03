"""Layers in one stack and in several stacks: equal predictions and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats import load as loading
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import attach

pytestmark = pytest.mark.slow


def adapted(source):
    model = loading.load_model(source, quant=QuantConfig(), dtype=jnp.float32)
    attach(model, choose_adapters(LoraConfig(rank=3), model.linears()), jax.random.key(0))
    random = np.random.default_rng(0)
    for _, linear, i in model.walk():
        for leaf in (linear.adapter.a, linear.adapter.b):
            fresh = random.normal(size=leaf.get_value().shape[1:]) * 0.1
            leaf.set_value(leaf.get_value().at[i].set(fresh))
    return model


def loss_and_gradient(model):
    graph, trained, frozen = trees.split(model, "qlora")
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 12)))
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)

    @jax.jit
    @jax.value_and_grad
    def run(trained):
        model = nnx.merge(graph, trained, frozen)
        segments = jnp.ones_like(tokens)
        hidden = model.hidden(tokens, segments, positions, dtype=jnp.float32, remat="dots")
        return jnp.mean(model.logits(hidden) ** 2)

    loss, grads = run(trained)
    return float(loss), trees.flatten(grads)


def test_runs_compute_what_one_stack_does(models, monkeypatch):
    source = open_folder(models / "llama")
    loss, whole = loss_and_gradient(adapted(source))
    monkeypatch.setattr(loading, "_stacks", lambda c: ([(0, 0), (0, 1), (1, 0)], [2, 1]))
    parts = adapted(source)
    assert len(parts.runs) == 2
    found, split = loss_and_gradient(parts)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert len(split) == 2 * len(whole)
    for path, expected in whole.items():
        name = path.removeprefix("runs.0.")
        joined = np.concatenate([split[f"runs.{i}.{name}"] for i in (0, 1)])
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-5 * scale, err_msg=path)
