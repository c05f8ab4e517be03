"""Adapters of the embedding and the head: logits in closed form, gradients, exports, merging."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from selection import mostly_slow

from qlora_jax.config import LoraConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.formats.peft import read_adapter, write_adapter
from qlora_jax.formats.write import write_model
from qlora_jax.lora import LoraWeights
from qlora_jax.lora.variables import LoraB, LoraParam
from qlora_jax.models import trees
from qlora_jax.models.adapters import set_adapter
from qlora_jax.models.decoder import attach
from qlora_jax.models.weight_shapes import layer_linears, outer_modules
from qlora_jax.train import layer_groups
from qlora_jax.train.export import adapters
from qlora_jax.train.step import Recipe, loss_sum
from qlora_jax.train.targets import targets

pytestmark = pytest.mark.quick

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 24))
KINDS = ("llama", "qwen2", "gemma2", "gpt_neox")
"""In order: untied; tied; tied with scaled embeddings and a soft cap; other module names."""
each_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(config, paths, rank=3) -> dict[str, LoraWeights]:
    """Makes random adapters of scale 2."""
    random = np.random.default_rng(1)
    sizes = layer_linears(config) | outer_modules(config)

    def matrix(*shape: int) -> np.ndarray:
        return (0.1 * random.normal(size=shape)).astype(np.float32)

    return {
        path: LoraWeights(matrix(sizes[path][0], rank), matrix(rank, sizes[path][1]), 6.0, 2.0)
        for path in paths
    }


def base(folder):
    return load_model(open_folder(folder), quant=None, dtype=jnp.float32)


@jax.jit(static_argnums=0)
def states(graph: Any, state: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
    return hidden, model.logits(hidden)


def computed(model, tokens=TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hidden states and the logits in float64."""
    hidden, logits = states(*nnx.split(model), jnp.asarray(tokens))
    return np.asarray(hidden, np.float64), np.asarray(logits, np.float64)


@each_kind
def test_logits_of_an_adapted_head_in_closed_form(models, kind):
    model = base(models / kind)
    embed = np.asarray(model.embed.get_value())
    weight = embed.T if model.head is None else np.asarray(model.head.get_value())
    hidden, _ = computed(model)
    own = drawn(model.config, ["lm_head"])
    set_adapter(model, own)
    found, logits = computed(model)
    # the head's adapter must not change a tied embedding
    np.testing.assert_array_equal(found, hidden)
    a, b = (np.asarray(x, np.float64) for x in own["lm_head"][:2])
    expected = hidden @ weight + 2.0 * (hidden @ a) @ b
    if cap := model.config.final_softcap:
        expected = cap * np.tanh(expected / cap)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@each_kind
def test_an_adapted_embedding_is_one_with_other_rows(models, kind):
    model, other = base(models / kind), base(models / kind)
    path = model.config.names.embed
    own = drawn(model.config, [path])
    set_adapter(model, own)
    embed = np.asarray(other.embed.get_value(), np.float64)
    changed = embed + 2.0 * np.asarray(own[path].a, np.float64) @ own[path].b
    assert np.abs(changed - embed).max() > 1e-2
    if other.head is None:  # tied: the head keeps the old embedding
        other.head = nnx.data(type(other.embed)(other.embed.get_value().T))
    other.embed.set_value(jnp.asarray(changed, jnp.float32))
    for found, expected in zip(computed(model), computed(other)):
        np.testing.assert_allclose(found, expected, atol=3e-5)


def reference(model, trained_of, tokens, targets_, mask):
    """Returns the loss function from whole logits, for jax's own differentiation."""

    def value(trained):
        made = trained_of(trained)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = made.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
        logp = jax.nn.log_softmax(made.logits(hidden))
        return -jnp.where(mask, jnp.take_along_axis(logp, targets_[..., None], -1)[..., 0], 0).sum()

    return value


@pytest.mark.parametrize("kind", mostly_slow(["llama", "gemma2"], "llama"))
def test_gradients_are_those_of_whole_logits(models, kind):
    model = base(models / kind)
    names = [model.config.names.embed, "lm_head", f"{model.config.names.layers}.0.self_attn.q_proj"]
    set_adapter(model, drawn(model.config, names))
    graph, trained, frozen = trees.split(model, "lora")
    assert set(trees.flatten(trained)) == {
        *(f"{name}.{side}" for name in ("embed_adapter", "head_adapter") for side in "ab"),
        *(f"runs.0.q_proj.adapter.{side}" for side in "ab"),
    }
    random = np.random.default_rng(2)
    tokens, wanted = (jnp.asarray(random.integers(0, 128, (2, 24))) for _ in range(2))
    mask = jnp.asarray(random.random((2, 24)) < 0.7)
    batch = {
        "tokens": tokens,
        "targets": wanted,
        "mask": mask,
        "segments": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(24), tokens.shape),
    }
    recipe = Recipe(graph, jnp.dtype("float32"), "none", 0.0, "qlora")

    @jax.jit
    def ours(trained):
        return loss_sum(recipe, trained, frozen, batch, None, "dots")[0]

    plain = reference(model, lambda t: nnx.merge(graph, t, frozen), tokens, wanted, mask)
    found, expected = (jax.jit(jax.value_and_grad(f))(trained) for f in (ours, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    slopes = trees.flatten(expected[1])
    for path, slope in trees.flatten(found[1]).items():
        size = np.abs(slopes[path]).max()
        assert size > 1e-3, path
        np.testing.assert_allclose(slope, slopes[path], atol=2e-5 * size, err_msg=path)


def test_fresh_ones_change_nothing_and_the_layers_draw_what_they_would(models):
    model, alone = base(models / "llama"), base(models / "llama")
    expected = computed(model)
    lora = LoraConfig(rank=4, target_modules=["q_proj", "lm_head", "embed_tokens"])
    attach(model, targets(lora, model.config), jax.random.key(0))
    few = LoraConfig(rank=4, target_modules=["q_proj"])
    attach(alone, targets(few, alone.config), jax.random.key(0))
    for found, same in zip(computed(model), expected):
        np.testing.assert_array_equal(found, same)
    drawn_, again = (trees.flatten(trees.split(m, "lora").trained) for m in (model, alone))
    for path, x in again.items():
        np.testing.assert_array_equal(drawn_[path], x)
    assert not np.any(drawn_["embed_adapter.a"])
    assert not np.any(drawn_["head_adapter.b"])
    assert np.any(drawn_["embed_adapter.b"])
    assert np.any(drawn_["head_adapter.a"])


def test_what_is_trained_and_counted(models):
    model = base(models / "llama")
    total = trees.parameter_counts(model, "lora")[1]
    lora = LoraConfig(rank=4, target_modules=["lm_head", "embed_tokens"])
    attach(model, targets(lora, model.config), jax.random.key(0))
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
    count = 2 * 4 * (vocabulary + hidden)
    assert trees.parameter_counts(model, "lora") == (count, total + count)
    kinds = [type(model.head_adapter.a), type(model.head_adapter.b)]
    assert kinds == [LoraParam, LoraB]
    # no layer has an adapter: one group, outside the layers
    trained = trees.split(model, "lora").trained
    assert [(group.layers, len(group.places)) for group in layer_groups.find_groups(trained)] == [
        (None, 4)
    ]


def test_dropout_is_on_the_heads_input_in_training_alone(models):
    model = base(models / "llama")
    lora = LoraConfig(rank=4, target_modules=["lm_head", "embed_tokens"])
    specs, values = targets(lora, model.config), drawn(model.config, ["lm_head"], 4)
    attach(model, specs, jax.random.key(0), dropout=0.5, values=values)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(64, model.config.hidden_size)))
    key = jax.random.key(3)
    kept, _ = model.head_delta(hidden, None)
    dropped, _ = model.head_delta(hidden, key)
    a = np.asarray(values["lm_head"].a)
    np.testing.assert_allclose(kept, 32 / 4 * (hidden @ a), rtol=1e-4)
    assert np.abs(dropped - kept).max() > 0.1
    np.testing.assert_array_equal(dropped, model.head_delta(hidden, key)[0])
    # the keys of the layers differ from the key of the head
    layers = jax.random.split(key, model.config.num_layers)
    own = jax.random.fold_in(key, model.config.num_layers)
    assert not any(
        jnp.array_equal(jax.random.key_data(k), jax.random.key_data(own)) for k in layers
    )
    assert model.embed_adapter.dropout == 0


@each_kind
def test_what_is_exported_is_read_back(models, tmp_path, kind):
    model = base(models / kind)
    linear = next(iter(layer_linears(model.config)))
    own = drawn(model.config, [linear, *outer_modules(model.config)])
    set_adapter(model, own)
    write_adapter(tmp_path / "adapter", adapters(model), base_name="base")
    back = read_adapter(tmp_path / "adapter").adapters
    assert back.keys() == own.keys()
    for path, weights in own.items():
        np.testing.assert_array_equal(back[path].a, weights.a)
        np.testing.assert_array_equal(back[path].b, weights.b)
        assert (back[path].alpha, back[path].scale) == (6.0, 2.0)


def test_the_head_of_gpt_neox_under_its_old_name(models, tmp_path):
    """transformers 4 calls the head embed_out."""
    model = base(models / "gpt_neox")
    own = drawn(model.config, ["lm_head", "gpt_neox.embed_in"])
    write_adapter(tmp_path / "adapter", own, base_name="base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k.replace("lm_head", "embed_out"): v for k, v in load_file(file).items()}, file)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"target_modules": ["embed_out", "embed_in"], "rank_pattern": {"embed_out": 3}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter(tmp_path / "adapter").adapters.keys() == own.keys()


@pytest.mark.parametrize(
    ("only", "original"),
    [
        pytest.param(0, False, marks=pytest.mark.slow),
        (1, True),
        pytest.param(None, False, marks=pytest.mark.slow),
    ],
    ids=["embedding", "head-original", "both"],
)
@each_kind
def test_a_merged_folder_computes_what_the_adapted_model_does(
    models, tiny_model, tmp_path, kind, only, original
):
    folder = shutil.copytree(models / kind, tmp_path / "model")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    model = base(folder)
    outer = list(outer_modules(model.config))
    linear = next(iter(layer_linears(model.config)))
    set_adapter(model, drawn(model.config, [linear, *(outer if only is None else [outer[only]])]))
    source = MergedCheckpoint(model, open_folder(folder), original)
    write_model(source, tmp_path / "merged", None, "float32")
    merged = base(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is (
        False
    )
    assert merged.head is not None
    for found, expected in zip(computed(merged), computed(model)):
        np.testing.assert_allclose(found, expected, atol=3e-5)


def test_a_tied_model_stays_tied_where_only_layers_are_adapted(models):
    source = open_folder(models / "qwen2")
    model = base(models / "qwen2")
    set_adapter(model, drawn(model.config, [next(iter(layer_linears(model.config)))]))
    merged = MergedCheckpoint(model, source)
    assert merged.config == source.config
    assert merged.names() == source.names()
