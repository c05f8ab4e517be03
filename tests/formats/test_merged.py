"""A merged model as a checkpoint has the logits of the live model, also with several stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.formats.peft import read_adapter, write_adapter
from qlora_jax.formats.write import write_model
from qlora_jax.lora import choose_adapters
from qlora_jax.models.decoder import attach
from qlora_jax.train.export import adapters

pytestmark = pytest.mark.quick

CONFIG = LoraConfig(rank=4, alpha=16, rank_pattern={"layers.1.self_attn.q_proj": 2})


TOKENS = np.random.default_rng(0).integers(0, 128, (2, 24))


def logits(model, tokens=TOKENS) -> np.ndarray:
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens):
        model = nnx.merge(graph, state)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
        return model.logits(hidden)

    return np.asarray(run(state, jnp.asarray(tokens)))


def adapted(source, quant=None, config=CONFIG):
    model = load_model(source, quant=quant, dtype=jnp.float32)
    attach(model, choose_adapters(config, model.linears()), jax.random.key(0))
    random = np.random.default_rng(1)
    for path, linear, i in model.walk():
        if linear.adapter is not None and (spec := linear.adapter.specs[i]):
            b = linear.adapter.b
            fresh = random.normal(size=(spec.rank, b.get_value().shape[-1])) * 0.05
            b.set_value(b.get_value().at[i, : spec.rank].set(fresh))
        assert path.startswith("model.layers.")
    return model


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("llama", QuantConfig()),
        pytest.param("qwen2", None, marks=pytest.mark.slow),
        pytest.param("llama_bnb_fp4", None, marks=pytest.mark.slow),
    ],
)
def test_its_logits_are_those_of_the_model_with_the_adapter(models, tmp_path, name, quant):
    source = open_folder(models / name)
    model = adapted(source, quant)
    merged = MergedCheckpoint(model, source)
    expected = logits(model)
    found = logits(load_model(merged, quant=None, dtype=jnp.float32))
    print(name, len(model.runs), "stacks", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
    assert (
        np.abs(expected - logits(load_model(source, quant=quant, dtype=jnp.float32))).max() > 1e-2
    )
    write_model(merged, tmp_path / "out", None, "float32")
    written = open_folder(tmp_path / "out")
    assert written.quantization is None
    np.testing.assert_array_equal(logits(load_model(written, quant=None, dtype=jnp.float32)), found)


def test_a_merged_adapter_of_pefts_computes_what_peft_did(models, tmp_path):
    source = open_folder(models / "llama")
    model = load_model(source, quant=None, dtype=jnp.float32)
    theirs = read_adapter(models / "llama" / "peft_lora").adapters
    attach(model, choose_adapters(LoraConfig(rank=8, alpha=16), model.linears()), jax.random.key(0))
    for path, linear, i in model.walk():
        for side in ("a", "b"):
            leaf = getattr(linear.adapter, side)
            leaf.set_value(leaf.get_value().at[i].set(getattr(theirs[path], side)))
    write_model(MergedCheckpoint(model, source), tmp_path / "out", None, "float32")
    tokens = np.load(models / "llama" / "reference.npz")["tokens"]
    expected = np.load(models / "llama" / "peft_lora" / "reference.npz")["logits"]
    found = logits(load_model(open_folder(tmp_path / "out"), quant=None, dtype=jnp.float32), tokens)
    print("against PEFT", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_several_stacks_have_every_layers_adapter_exported_once(models, tmp_path):
    source = open_folder(models / "llama_bnb_fp4")
    model = adapted(source)
    assert len(model.runs) == 3
    write_adapter(tmp_path / "adapter", adapters(model), base_name="base")
    back = read_adapter(tmp_path / "adapter").adapters
    assert list(model.linears()) == [
        n.removesuffix(".weight") for n in source.names() if "_proj" in n
    ]
    assert back.keys() == model.linears().keys()
    for path, linear, i in model.walk():
        rank = linear.adapter.specs[i].rank
        np.testing.assert_array_equal(back[path].a, linear.adapter.a.get_value()[i, :, :rank])
    assert back["model.layers.1.self_attn.q_proj"].rank == 2


def test_the_original_weights_are_the_files(models):
    source = open_folder(models / "llama")
    model = adapted(source, QuantConfig(), LoraConfig(rank=4, target_modules=["v_proj"]))
    merged = MergedCheckpoint(model, source, original=True)
    weights = load_file(models / "llama" / "model.safetensors")
    changes = adapters(model)
    for name, weight in weights.items():
        change = 0.0
        if (path := name.removesuffix(".weight")) in changes:
            own = changes[path]
            change = own.alpha / own.rank * (own.a.astype(np.float64) @ own.b).T
            assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(merged.read(name), weight + change, rtol=0, atol=1e-6)


def test_to_4_bits_is_written_as_a_model_of_floats_would_be(models, tmp_path):
    source = open_folder(models / "llama")
    merged = MergedCheckpoint(adapted(source, QuantConfig()), source)
    write_model(merged, tmp_path / "floats", None, "float32")
    write_model(merged, tmp_path / "direct", QuantConfig(), "bfloat16")
    write_model(open_folder(tmp_path / "floats"), tmp_path / "again", QuantConfig(), "bfloat16")
    found, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("direct", "again"))
    assert found.keys() == expected.keys()
    assert all(found[n].tobytes() == expected[n].tobytes() for n in expected)
