"""Models with initial adapters read from a PEFT adapter, or computed from the weights."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax import config as configs
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft import read_adapter
from qlora_jax.models import trees
from qlora_jax.quant import QTensor, dequantize
from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.train.export import export_adapter
from qlora_jax.train.initial_values import Splitter, resolved, with_replaced
from qlora_jax.train.setup import load_run_model, open_model

pytestmark = pytest.mark.quick

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
LLAMA = GOLDEN / "llama"


def config_of(model, method="lora", storage="float32", **lora):
    tree = {
        "model": {"path": str(model), "compute_dtype": "float32", "storage_dtype": storage},
        "data": {"source": "d"},
        "output": "run",
        "method": method,
        "lora": lora,
    }
    return resolved(configs.from_tree(tree, "test"))


def build(config):
    checkpoint = with_replaced(config, open_folder(Path(config.model.path)))
    return load_run_model(config, checkpoint, pytest.fail)[0]


@functools.partial(jax.jit, static_argnums=0)
def apply(structure, weights, tokens):
    model = nnx.merge(structure, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
    return model.logits(hidden)


def logits(model, tokens):
    return np.asarray(apply(*nnx.split(model), jnp.asarray(tokens)))


ADAPTERS = [
    pytest.param("llama/peft_rslora", marks=pytest.mark.slow),
    pytest.param("llama/peft_patterns", marks=pytest.mark.slow),
    pytest.param("llama/peft_dora", marks=pytest.mark.slow),
    "llama/peft_dora_patterns",
    "llama/peft_saved",
    "llama_rope_linear_biases/peft_biases",
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_that_goes_on_from_an_adapter_computes_as_peft_and_exports_it(name, tmp_path):
    folder = GOLDEN / name
    reference = np.load(folder / "reference.npz")
    tokens = np.load(folder.parent / "reference.npz")["tokens"][: len(reference["logits"])]
    config = config_of(folder.parent, from_adapter=str(folder))
    model = build(config)
    np.testing.assert_allclose(logits(model, tokens), reference["logits"], rtol=0, atol=1e-5)
    base = np.load(folder.parent / "reference.npz")["logits"][: len(tokens)]
    assert np.abs(base - reference["logits"]).max() > 0.1
    export_adapter(config, model, tmp_path / "out")
    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.tobytes() == after[key].tobytes(), key
    theirs, ours = read_adapter(folder), read_adapter(tmp_path / "out")
    assert (theirs.scaling, theirs.dora) == (ours.scaling, ours.dora)
    for path, adapter in theirs.adapters.items():
        assert adapter.scale == ours.adapters[path].scale


def test_dora_on_nf4_computes_as_peft_on_bitsandbytes():
    folder = LLAMA / "peft_dora"
    config = config_of(LLAMA, "qlora", from_adapter=str(folder))
    plain_scales = dataclasses.replace(config.quant, double_quant=False)
    model = build(dataclasses.replace(config, quant=plain_scales))
    reference = np.load(folder / "reference.npz")
    tokens = np.load(LLAMA / "reference.npz")["tokens"][:1]
    np.testing.assert_allclose(logits(model, tokens), reference["logits_nf4"], rtol=0, atol=1e-5)
    assert np.abs(reference["logits"] - reference["logits_nf4"]).max() > 0.1


@pytest.fixture
def copied(tmp_path):
    """A copy of an adapter that a test may change."""
    return Path(shutil.copytree(LLAMA / "peft_patterns", tmp_path / "adapter"))


def change(folder, **renamed):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({renamed.get(key, key): value for key, value in tensors.items()}, path)


def test_the_adapter_decides_over_defaults_and_refuses_contradictions(copied):
    lora = config_of(LLAMA, from_adapter=str(copied)).lora
    stored = read_adapter(copied).adapters
    assert lora.target_modules == sorted(stored)
    for path, adapter in stored.items():
        assert lora.rank_pattern.get(path, lora.rank) == adapter.rank
        assert lora.alpha_pattern.get(path, lora.alpha) == adapter.alpha
    same = config_of(LLAMA, from_adapter=str(copied), **{"rank": lora.rank, "alpha": lora.alpha})
    assert same.lora == lora
    assert resolved(same) == same
    for asked in ({"rank": 7}, {"variant": "dora"}, {"init": "pissa"}, {"scaling": "constant"}):
        with pytest.raises(UserError, match=rf"lora\.{next(iter(asked))} .*contradicts"):
            config_of(LLAMA, from_adapter=str(copied), **asked)


def test_an_adapter_of_another_model_is_refused_with_what_does_not_fit(copied):
    smaller = GOLDEN / "llama_rope_llama3"
    with pytest.raises(UserError, match="belongs to another model") as e:
        build(config_of(smaller, from_adapter=str(copied)))
    assert "model.layers.2.self_attn.q_proj (the model has none)" in str(e.value)
    assert "model.layers.0.self_attn.q_proj (adapter [64, 64], model [32, 32])" in str(e.value)


def test_an_adapter_without_effect_is_warned_about(copied):
    path = copied / "adapter_model.safetensors"
    tensors = {k: np.zeros_like(v) if "lora_B" in k else v for k, v in load_file(path).items()}
    save_file(tensors, path)
    lines = []
    load_run_model(config_of(LLAMA, from_adapter=str(copied)), open_folder(LLAMA), lines.append)
    assert lines == [
        f"warning: {copied}: A or B of every module is zero, so the adapter changes nothing"
    ]


def stored_weights(model):
    weights = {}
    for path, linear, i in model.walk():
        weight = linear.weight.get_value()
        whole = jax.jit(dequantize)(weight) if isinstance(weight, QTensor) else weight
        weights[path] = np.asarray(whole, np.float64)[i]
    return weights


def test_pissa_splits_the_weight_at_its_largest_values(tmp_path):
    config = config_of(
        LLAMA, init="pissa", rank=4, alpha=6, rank_pattern={"layers.1.self_attn.q_proj": 2}
    )
    lines = []
    model = load_run_model(config, open_folder(LLAMA), lines.append)[0]
    assert lines[0].startswith("pissa: base and adapters differ")
    exact = load_file(LLAMA / "model.safetensors")
    base = stored_weights(model)
    for path, linear, i in model.walk():
        rank = 2 if path.endswith("1.self_attn.q_proj") else 4
        w = exact[f"{path}.weight"].T.astype(np.float64)
        u, s, vt = np.linalg.svd(w)
        top = (u[:, :rank] * s[:rank]) @ vt[:rank]
        a, b = (
            np.asarray(v.get_value()[i], np.float64) for v in (linear.adapter.a, linear.adapter.b)
        )
        assert not a[:, rank:].any()
        update = float(linear.adapter.scale.get_value()[i]) * a @ b
        # rounding turns singular vectors by up to error / gap of singular values (Davis and Kahan)
        turned = s[0] * (1 + 2 * s[rank - 1] / (s[rank - 1] - s[rank]))
        assert np.linalg.norm(update - top, 2) <= 4 * np.finfo(np.float32).eps * turned
        np.testing.assert_allclose(np.linalg.norm(w - update), np.linalg.norm(w - top), rtol=1e-7)
        np.testing.assert_allclose(base[path] + update, w, atol=5e-7)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4)
    tokens = np.load(LLAMA / "reference.npz")["tokens"]
    reference = np.load(LLAMA / "reference.npz")["logits"]
    np.testing.assert_allclose(logits(model, tokens), reference, atol=1e-5)


def moved(model):
    """Returns the model with every trained number changed a little, as training would."""
    graph, trained, frozen = trees.split(model, "lora")
    random = np.random.default_rng(0)

    def move(x):
        return x * jnp.asarray(1 + 0.3 * random.normal(size=x.shape), x.dtype)

    return nnx.merge(graph, jax.tree.map(move, trained), frozen)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_export_of_pissa_is_for_the_pretrained_weights(tmp_path, variant):
    config = config_of(
        LLAMA,
        variant=variant,
        init="pissa",
        rank=4,
        scaling="alpha/sqrt(r)",
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
    )
    model = moved(load_run_model(config, open_folder(LLAMA), lambda line: None)[0])
    export_adapter(config, model, tmp_path / "out")
    ranks = {a.rank for a in read_adapter(tmp_path / "out").adapters.values()}
    assert ranks == {8, 4}
    again = build(config_of(LLAMA, from_adapter=str(tmp_path / "out")))
    tokens = np.load(LLAMA / "reference.npz")["tokens"]
    found, base = logits(again, tokens), np.load(LLAMA / "reference.npz")["logits"]
    np.testing.assert_allclose(found, logits(model, tokens), atol=1e-5)
    assert np.abs(found - base).max() > 0.1


def test_four_bits_lose_less_with_pissa_and_loftq_and_loftq_less_with_more_turns():
    exact = load_file(LLAMA / "model.safetensors")

    def loss(**lora):
        config = config_of(LLAMA, "qlora", rank=8, target_modules=["q_proj"], **lora)
        splitter = Splitter(config.lora, {})
        assert splitter.errors == {}
        model = load_run_model(config, open_folder(LLAMA), lambda line: None)[0]
        base, total = stored_weights(model), 0.0
        for path, linear, i in model.walk():
            if linear.adapter:
                values = linear.adapter.weights(i)
                update = float(linear.adapter.scale.get_value()[i]) * values.a @ values.b
                total += np.sum((exact[f"{path}.weight"].T - base[path] - update) ** 2)
        return total

    plain, pissa = loss(), loss(init="pissa")
    once, more = (loss(init="loftq", loftq_iterations=n) for n in (1, 4))
    assert more < once < plain
    assert pissa < plain


def test_a_start_that_is_far_from_the_weights_is_a_failure():
    splitter = Splitter(configs.LoraConfig(init="pissa"), {})
    splitter.errors = {"p": (0.19, 0.09), "q": (0.08, 0.09)}
    with pytest.raises(RunFailed, match=r"p: lora\.init pissa .* 1\.90e-01, .* by 9\.00e-02"):
        splitter.report(pytest.fail)


def test_loftq_needs_a_quantized_base(tiny_model):
    with pytest.raises(UserError, match=r"loftq .*method lora does not quantize"):
        open_model(config_of(tiny_model, init="loftq"))


def test_the_config_of_a_run_is_what_the_adapter_decided(tmp_path):
    config = config_of(LLAMA, from_adapter=str(LLAMA / "peft_dora"))
    configs.dump(config, tmp_path / "config.yaml")
    assert configs.load_config(tmp_path / "config.yaml") == config
    assert json.loads((LLAMA / "peft_dora" / "adapter_config.json").read_text())["use_dora"]
    assert config.lora.variant == "dora"
