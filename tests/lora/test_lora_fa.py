"""LoRA-FA (arXiv 2308.03303): A keeps its random initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraConfig, OptimizerConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import attach
from qlora_jax.train import step as steps
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import init_state

pytestmark = pytest.mark.quick

CONFIG = LoraConfig(rank=4, target_modules=["q_proj"])


def test_a_has_no_gradient_and_no_moments_and_b_moves_as_with_a_trained_a(models):
    moved = {}
    for freeze in (False, True):
        model = load_model(open_folder(models / "llama"), quant=None, dtype=jnp.float32)
        attach(model, choose_adapters(CONFIG, model.linears()), jax.random.key(0), freeze_a=freeze)
        assert trees.parameter_counts(model, "lora")[0] == 3 * 4 * (64 if freeze else 128)
        graph, trained, frozen = trees.split(model, "lora")
        names = {path.rpartition(".")[2] for path in trees.flatten(trained)}
        assert names == ({"b"} if freeze else {"a", "b"})
        optimizer = adamw(OptimizerConfig(learning_rate=0.01), 10)
        state = init_state(trained, optimizer, False)
        moments = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
        assert moments == 2 * sum(x.size for x in jax.tree.leaves(trained))
        program = steps.build(
            graph,
            optimizer,
            compute_dtype=jnp.float32,
            remat="dots",
            clip_norm=0.0,
            method="qlora",
        )
        tokens = jnp.arange(32, dtype=jnp.int32).reshape(1, 2, 16)
        batch = {
            "tokens": tokens,
            "targets": tokens + 1,
            "segments": jnp.ones_like(tokens),
            "positions": jnp.broadcast_to(jnp.arange(16), tokens.shape),
            "mask": jnp.ones(tokens.shape, bool),
        }
        gradients, figures = program.gradient(state, frozen, batch, None)
        state = program.update(state, gradients, figures.finite)
        after = nnx.merge(graph, state.trained, frozen).runs[0].q_proj.adapter
        moved[freeze] = [np.asarray(v.get_value()) for v in (after.a, after.b)]
    start = load_model(open_folder(models / "llama"), quant=None, dtype=jnp.float32)
    attach(start, choose_adapters(CONFIG, start.linears()), jax.random.key(0))
    np.testing.assert_array_equal(moved[True][0], start.runs[0].q_proj.adapter.a.get_value())
    # B is zero at first, so A's gradient is zero and only B moves with a trained A too
    np.testing.assert_allclose(moved[True][1], moved[False][1], atol=1e-6)
    assert np.abs(moved[True][1]).min() > 0
