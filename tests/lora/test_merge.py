"""Merging one linear: its value in float64, and the cost of the merged model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.lora import Adapter, AdapterSpec, choose_adapters
from qlora_jax.lora.linear import merged
from qlora_jax.models.decoder import attach
from qlora_jax.quant import dequantize, quantize

SPECS = [AdapterSpec(3, 6.0, 2.0), None, AdapterSpec(2, 8.0, 4.0)]


@pytest.fixture
def adapter():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 96, 3)), random.normal(size=(3, 3, 40))
    a[2, :, 2:], b[2, 2:] = 0, 0
    scale = jnp.array([s.scale if s else 0.0 for s in SPECS], jnp.float32)
    return Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale, SPECS)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_delta_is_the_scaled_product(adapter, layer):
    a, b = (np.asarray(x.get_value(), np.float64)[layer] for x in (adapter.a, adapter.b))
    scale = SPECS[layer].scale if SPECS[layer] else 0.0
    found = adapter.weight_update(jnp.zeros((96, 40)), layer)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, scale * (a @ b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, "nf4"])
def test_the_sum_is_rounded_once(adapter, stored, dtype):
    w = jnp.asarray(np.random.default_rng(1).normal(size=(96, 40)), jnp.float32)
    weight = quantize(w) if stored == "nf4" else w.astype(stored)
    wide = np.asarray(dequantize(weight) if stored == "nf4" else weight, np.float32)
    change = adapter.weight_update(jnp.asarray(wide), 0)
    expected = (wide + np.asarray(change)).astype(dtype)
    np.testing.assert_array_equal(merged(weight, adapter, 0, dtype=dtype), expected)
    np.testing.assert_array_equal(merged(weight, None, 0, dtype=dtype), wide.astype(dtype))


@pytest.mark.parametrize(
    ("kind", "variant", "quant"),
    [
        pytest.param("llama", "dora", None, marks=pytest.mark.slow),
        ("llama", "dora", QuantConfig()),
        pytest.param("phi3", "lora", QuantConfig(), marks=pytest.mark.slow),
        pytest.param("gpt_neox", "dora", QuantConfig(), marks=pytest.mark.slow),
        ("gemma3", "lora", None),
        pytest.param("opt", "lora", QuantConfig(), marks=pytest.mark.slow),
    ],
)
@pytest.mark.quick
def test_a_merged_model_is_the_same_function(models, kind, variant, quant):
    source = open_folder(models / kind)
    model = load_model(source, quant=quant, dtype=jnp.float32)
    plain = logits(model)
    attach(
        model,
        choose_adapters(LoraConfig(rank=4), model.linears()),
        jax.random.key(0),
        variant=variant,
    )
    for run in model.runs:
        for linear in run.linears().values():
            b = linear.adapter.b
            key = jax.random.key(b.get_value().size)
            b.set_value(0.05 * jax.random.normal(key, b.get_value().shape))
    expected = logits(model)
    assert np.abs(expected - plain).max() > 0.01
    found = logits(load_model(MergedCheckpoint(model, source), quant=None, dtype=jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def logits(model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 16)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
    return np.asarray(model.logits(hidden))


def cost(model) -> tuple[float, float]:
    """Returns the operations and the bytes of the compiled program for 2 x 16 tokens."""
    graph, state = nnx.split(model)

    def logits(state, tokens):
        model = nnx.merge(graph, state)
        positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
        hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
        return model.logits(hidden)

    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    analysis = jax.jit(logits).lower(state, tokens).compile().cost_analysis()
    return analysis["flops"], analysis["bytes accessed"]


@pytest.mark.quick
def test_a_merged_model_costs_what_its_base_does_and_an_adapter_more(models):
    source = open_folder(models / "llama")
    base = cost(load_model(source, quant=None, dtype=jnp.float32))
    model = load_model(source, quant=None, dtype=jnp.float32)
    attach(model, choose_adapters(LoraConfig(rank=8), model.linears()), jax.random.key(0))
    adapted = cost(model)
    assert cost(load_model(MergedCheckpoint(model, source), quant=None, dtype=jnp.float32)) == base
    print("flops, bytes:", base, "with adapters:", adapted)
    assert adapted[0] > base[0]
    assert adapted[1] > base[1]
