"""Modules that a run adapts: embedding and head only if named; settings that refuse the two."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from qlora_jax import config as configs
from qlora_jax.bench.random_codes import random_model
from qlora_jax.config import LoraConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft.plain import check_shared
from qlora_jax.lora import LoraWeights
from qlora_jax.models import trees
from qlora_jax.models.weight_shapes import layer_linears
from qlora_jax.plan.exact import count
from qlora_jax.plan.ledger import ledger
from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.train.identity import check_identity
from qlora_jax.train.population import train_population
from qlora_jax.train.setup import load_run_model, open_model
from qlora_jax.train.targets import targets

pytestmark = pytest.mark.quick

MODELS = Path(__file__).parents[1] / "golden" / "models"
OUTER = ["lm_head", "embed_tokens"]


@pytest.fixture
def decoder(tiny_model):
    """Decoder config of the tiny llama."""
    return open_folder(tiny_model).config


@pytest.fixture
def make_config(tiny_model, chats):
    def make(**lora):
        tree = {
            "model": {"path": str(tiny_model)},
            "data": {"source": str(chats), "sequence_length": 64},
            "output": "run",
            "lora": {"rank": 4} | lora,
        }
        return configs.from_tree(tree, "test")

    return make


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (["lm_head"], ["lm_head"]),
        (["embed_tokens"], ["model.embed_tokens"]),
        (["model.embed_tokens", "lm_head"], ["model.embed_tokens", "lm_head"]),
        (r"lm_.*|.*\.0\.mlp\.up_proj", ["model.layers.0.mlp.up_proj", "lm_head"]),
        (r"model\.e.*", ["model.embed_tokens"]),
    ],
)
def test_embedding_and_head_by_a_name_or_an_expression(decoder, wanted, chosen):
    assert list(targets(LoraConfig(target_modules=wanted), decoder)) == chosen


def test_all_linear_is_the_layers_alone(decoder):
    assert list(targets(LoraConfig(), decoder)) == list(layer_linears(decoder))


def test_gpt_neoxs_head_by_both_its_names():
    decoder = open_folder(MODELS / "gpt_neox").config
    for name in ("embed_out", "lm_head"):
        lora = LoraConfig(target_modules=[name, "embed_in"], rank_pattern={name: 3})
        found = {path: spec.rank for path, spec in targets(lora, decoder).items()}
        assert found == {"gpt_neox.embed_in": 16, "lm_head": 3}


def test_patterns_are_for_them_too(decoder):
    lora = LoraConfig(target_modules=OUTER, rank_pattern={"embed_tokens": 2}, rank=8)
    assert [spec.rank for spec in targets(lora, decoder).values()] == [2, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["head"]}, r"'head'\] matches no linear; .*embed_tokens, .*lm_head"),
        ({"target_modules": OUTER, "variant": "dora"}, "variant dora: not for .*_tokens and lm_"),
        ({"target_modules": ["lm_head"], "init": "pissa"}, "init pissa: not for lm_head; leave"),
        ({"target_modules": ["embed_tokens"], "init": "loftq"}, "init loftq: not for model.embed"),
        (
            {"target_modules": ["embed_tokens"], "freeze_a": True},
            r"lora\.freeze_a: A of model\.embed_tokens starts at zero .* set freeze_a to false",
        ),
    ],
)
def test_what_they_are_not_for_is_refused_in_one_line(decoder, settings, message):
    with pytest.raises(UserError, match=message) as e:
        targets(LoraConfig(**settings), decoder)
    assert "\n" not in str(e.value)


def test_a_head_may_have_a_frozen_a(make_config):
    config = make_config(target_modules=["lm_head"], freeze_a=True)
    model, _ = load_run_model(config, open_model(config)[0], pytest.fail)
    assert set(trees.flatten(trees.split(model, "lora").trained)) == {"head_adapter.b"}


def test_a_population_and_random_weights_are_without_them(make_config, decoder):
    with pytest.raises(UserError, match="a population does not support lm_head; leave it out"):
        train_population(make_config(), [{"lora.target_modules": "[q_proj, lm_head]"}])
    with pytest.raises(UserError, match=r"no adapter on model\.embed_tokens; remove it"):
        random_model(make_config(target_modules=OUTER), decoder, None)


def test_one_of_several_adapters_is_without_them():
    own = {"lm_head": LoraWeights(jnp.zeros((64, 2)), jnp.zeros((2, 256)), 1.0, 1.0)}
    with pytest.raises(UserError, match=r"here: an adapter of lm_head .* merge it into the model"):
        check_shared("here", own)


@pytest.mark.parametrize(
    ("path", "leaf"),
    [
        ("model.embed_tokens", ("embed_adapter", "a")),
        ("model.embed_tokens", ("embed_adapter", "b")),
        ("lm_head", ("head_adapter", "b")),
    ],
)
def test_a_fresh_one_that_changes_something_is_named(make_config, path, leaf):
    config = make_config(target_modules=OUTER)
    model, _ = load_run_model(config, open_model(config)[0], pytest.fail)
    check_identity(*trees.split(model, "lora"), config)
    variable = getattr(getattr(model, leaf[0]), leaf[1])
    # A of a fresh embedding adapter is zero, so its B may be any finite number
    wrong = jnp.nan if leaf == ("embed_adapter", "b") else 0.5
    variable.set_value(variable.get_value().at[-1, -1].set(wrong))
    with pytest.raises(RunFailed, match=f"first at {path};"):
        check_identity(*trees.split(model, "lora"), config)


def test_a_plan_counts_them_to_the_byte(make_config, decoder):
    config = make_config(target_modules=["q_proj", *OUTER])
    without = dataclasses.replace(
        config, lora=dataclasses.replace(config.lora, target_modules=["q_proj"])
    )
    model, _ = load_run_model(config, open_model(config)[0], pytest.fail)
    outer = nnx.state(list(model.outer_adapters().values()))
    size = sum(x.nbytes for path, x in trees.flatten(outer).items() if "scale" not in path)
    assert size == 2 * 4 * 4 * (decoder.vocab_size + decoder.hidden_size)
    more, less = count(decoder, config), count(decoder, without)
    assert more.trained - less.trained == size
    assert more.gradients - less.gradients == size
    assert more.moments - less.moments == 2 * size
    assert more.model["adapters"] - less.model["adapters"] == size
    # the loss also holds the gradient of the head's B, and rows wider by the head's rank
    parts, before = ledger(decoder, config), ledger(decoder, without)
    assert parts["loss"].nbytes - before["loss"].nbytes >= 4 * 4 * decoder.vocab_size
    assert parts["activations"].nbytes == before["activations"].nbytes
