import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import PretrainConfig
from qlora_jax.formats.fresh import FreshCheckpoint, shapes
from qlora_jax.formats.load import load_model
from qlora_jax.formats.names import check_shapes
from qlora_jax.runtime.errors import UserError

PRETRAIN = PretrainConfig(
    vocab_size=500, hidden_size=64, intermediate_size=160, layers=8, heads=4, kv_heads=2
)


def test_shapes_are_the_configs():
    checkpoint = FreshCheckpoint(shapes(PRETRAIN), 0)
    found = {name: checkpoint.read(name).shape for name in checkpoint.names()}
    assert found == check_shapes(found, checkpoint.config, "fresh")
    assert found["model.layers.7.self_attn.k_proj.weight"] == (32, 64)
    assert "lm_head.weight" not in found


def test_values_have_the_stated_deviation():
    checkpoint = FreshCheckpoint(shapes(PRETRAIN), 3)
    for name in checkpoint.names():
        values = checkpoint.read(name)
        if values.ndim == 1:
            assert (values == 1).all()
            continue
        narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / 4 if narrow else 0.02
        n = values.size  # the relative standard error of a sample deviation is 1 / sqrt(2n)
        assert values.std() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert abs(values.mean()) < 5 * std / math.sqrt(n)


def test_values_depend_on_seed_and_name_alone():
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    first = FreshCheckpoint(shapes(PRETRAIN), 1)
    deeper = FreshCheckpoint(shapes(dataclasses.replace(PRETRAIN, layers=9)), 1)
    np.testing.assert_array_equal(first.read(name), deeper.read(name))
    assert not np.array_equal(first.read(name), first.read(other))
    assert not np.array_equal(first.read(name), FreshCheckpoint(first.config, 2).read(name))


@pytest.mark.quick
def test_it_knows_nothing():
    """Random embeddings and a normalized hidden state give logits of variance 0.02² · hidden.

    The input token is left out of the softmax, because tied embeddings make it likelier.
    """
    model = load_model(FreshCheckpoint(shapes(PRETRAIN), 0), quant=None, dtype=jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 500, (8, 32)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(32), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), places, dtype=jnp.float32)
    logits = np.array(model.logits(hidden), np.float64)
    np.put_along_axis(logits, np.asarray(tokens)[..., None], -np.inf, axis=-1)
    log_sum = np.log(np.exp(logits).sum(-1)).mean()
    assert log_sum == pytest.approx(math.log(499) + 0.02**2 * 64 / 2, abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"heads": 3}, "pretrain.heads"), ({"heads": 64}, "even"), ({"kv_heads": 3}, "kv_heads: 3")],
)
def test_heads_must_divide(changes, named):
    with pytest.raises(UserError, match=named):
        shapes(dataclasses.replace(PRETRAIN, **changes))
