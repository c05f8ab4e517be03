"""Every family: its options, its config.json of transformers 4 and 5, adapters and gradients."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from selection import mostly_slow

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats import peft
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.lora import AdapterSpec, choose_adapters
from qlora_jax.models import config, trees
from qlora_jax.models.config import FAMILIES, Rope, from_hugging_face
from qlora_jax.models.decoder import attach
from qlora_jax.models.layers import ACTIVATIONS
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.loss import token_loss

pytestmark = pytest.mark.quick

LINEARS = {
    "gpt_neox": (
        "gpt_neox.layers.1.",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "phi3": (
        "model.layers.1.",
        ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    ),
    "opt": (
        "model.decoder.layers.1.",
        [*(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "fc1", "fc2"],
    ),
}


def logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
    return model.logits(hidden)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"rope": Rope(theta=1e6)}),
        ("smollm3", {"unrotated": ()}),
        ("olmo2", {"norm_eps": 1e-2}),
        ("gemma", {"scaled_embeddings": False}),
        ("gemma", {"activation": "silu"}),
        ("gemma", {"norm": "rms_float32"}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"final_softcap": None}),
        ("gemma2", {"attention_scale": None}),
        ("gemma2", {"windows": (None, None)}),
        ("gemma3", {"local_rope": None}),
        ("phi3", {"rope": Rope()}),
        ("phi3", {"windows": (None, None)}),
        ("gpt_neox", {"parallel_residual": False}),
        ("gpt_neox", {"fused_qkv": "concatenated"}),
        ("opt", {"activation": "gelu"}),
        ("opt", {"positions_before": 0}),
    ],
    ids=str,
)
def test_an_option_is_not_without_effect(models, open_model, name, changes):
    """Another value changes the logits, so the reference logits do test the option."""
    reference = np.load(models / name / "reference.npz")
    model = open_model(name)
    changed = dataclasses.replace(model.config, **changes)
    model.config = changed
    for run in model.runs:
        run.config = changed
        for part in vars(run).values():
            if hasattr(part, "kind"):
                part.kind, part.eps = changed.norm, changed.norm_eps
    model.norm.kind, model.norm.eps = changed.norm, changed.norm_eps
    found = logits(model, jnp.asarray(reference["tokens"]))
    assert np.abs(found - reference["logits"]).max() > 1e-3


@pytest.mark.parametrize("name", LINEARS)
def test_linears_are_hugging_faces(models, open_model, name):
    layer, paths = LINEARS[name]
    checkpoint, found = open_folder(models / name), open_model(name, QuantConfig()).linears()
    assert [p for p in found if p.startswith(layer)] == [layer + p for p in paths]
    for path, shape in found.items():
        assert shape == checkpoint.shape(f"{path}.weight")[::-1]


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_pefts_adapters_of_fused_linears(models, open_model, name):
    folder = models / name / "peft_lora"
    read, model = peft.read_adapter(folder), open_model(name)
    specs = {p: AdapterSpec(a.rank, a.alpha, 2.0) for p, a in read.adapters.items()}
    assert specs.keys() == model.linears().keys()
    attach(model, specs, jax.random.key(0))
    for path, linear, i in model.walk():
        for side in ("a", "b"):
            stack = getattr(linear.adapter, side)
            stored = getattr(read.adapters[path], side)
            stack.set_value(stack.get_value().at[i].set(stored))
    base, adapted = (np.load(f / "reference.npz") for f in (folder.parent, folder))
    assert np.abs(adapted["logits"] - base["logits"]).max() > 1e-2
    found = logits(model, jnp.asarray(base["tokens"]))
    np.testing.assert_allclose(found, adapted["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", mostly_slow(["gemma2", "gpt_neox", "opt"], "gemma2"))
def test_gradients_of_adapters_are_those_of_a_dense_loss(models, open_model, name):
    """Compares remat and the custom gradients of attention and loss with plain jax.grad."""
    tokens = jnp.asarray(np.load(models / name / "reference.npz")["tokens"])[:, :24]
    model = open_model(name)
    attach(model, choose_adapters(LoraConfig(rank=2), model.linears()), jax.random.key(0))
    for _, linear, i in model.walk():
        b = linear.adapter.b
        b.set_value(b.get_value().at[i].set(0.05 * jnp.cos(jnp.arange(b[i].size)).reshape(2, -1)))
    structure, trained, frozen = trees.split(model, "lora")
    positions = jnp.broadcast_to(jnp.arange(23), (2, 23))

    def ours(trained):
        model = nnx.merge(structure, trained, frozen)
        hidden = model.hidden(
            tokens[:, :-1], jnp.ones((2, 23), int), positions, dtype=jnp.float32, remat="dots"
        )
        head, axis = model.stored_head()
        mask, cap = jnp.ones((2, 23), bool), model.config.final_softcap
        return token_loss(hidden, head, tokens[:, 1:], mask, vocab_axis=axis, softcap=cap)[0]

    def dense(trained):
        model = nnx.merge(structure, trained, frozen)
        log_p = jax.nn.log_softmax(logits(model, tokens[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).sum()

    total, found = jax.jit(jax.value_and_grad(ours))(trained)
    expected_total, expected = jax.jit(jax.value_and_grad(dense))(trained)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
    for path, gradient in trees.flatten(expected).items():
        size = np.abs(gradient).max()
        assert size > 1e-3, path
        np.testing.assert_allclose(trees.flatten(found)[path], gradient, rtol=0, atol=1e-4 * size)


SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def read(family, **settings):
    return from_hugging_face({"model_type": family} | SHAPE | settings, "config.json")


@pytest.mark.parametrize(
    ("family", "four", "five"),
    [
        (
            "gemma3_text",
            {
                "rope_theta": 5e5,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window": 512,
                "sliding_window_pattern": 3,
                "torch_dtype": "bfloat16",
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                },
                "sliding_window": 512,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4,
                "dtype": "bfloat16",
            },
        ),
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 2e4},
            {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 2e4}},
        ),
        ("gpt_neox", {}, {"rope_parameters": {"partial_rotary_factor": 0.25}}),
        (
            "phi3",
            {"partial_rotary_factor": 0.75, "rope_theta": 2e4, "rope_scaling": None},
            {"rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 2e4}},
        ),
        ("gemma2", {}, {"layer_types": ["sliding_attention", "full_attention"] * 6}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0] * 3}, {"rope_parameters": {"rope_theta": 2e6}}),
    ],
)
def test_config_as_transformers_4_and_5_write_it(family, four, five):
    assert read(family, **four) == read(family, **five)


SIXTEEN = {
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 9,
}


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_of_phi3_has_three_names(kind):
    rope = read("phi3", max_position_embeddings=8192, rope_scaling=SIXTEEN | {"type": kind}).rope
    factor = (1 + math.log(2) / math.log(4096)) ** 0.5
    assert (rope.kind, rope.original_positions, rope.long) == ("longrope", 4096, (2.0,) * 8)
    assert rope.attention_factor == pytest.approx(factor)


def test_a_rope_for_each_kind_of_layer():
    linear = {"rope_type": "linear", "factor": 4.0}
    both = read(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": linear | {"rope_theta": 3e4},
        },
        rope_scaling=linear,
    )
    assert both.rope == Rope(theta=5e5, kind="linear", factor=4.0)
    assert both.local_rope == Rope(theta=3e4, kind="linear", factor=4.0)
    flat = read("gemma3_text", rope_parameters=linear)  # transformers ignores this form
    assert (flat.rope, flat.local_rope) == (Rope(theta=1e6), Rope(theta=1e4))


def test_what_a_family_implies():
    gemma = read("gemma2", query_pre_attn_scalar=144)
    assert gemma.attention_scale == 1 / 12
    assert (gemma.attention_softcap, gemma.final_softcap) == (50, 30)
    assert gemma.windows == (4096, None) * 6
    assert gemma.tie_embeddings
    assert read("gemma", hidden_act="gelu").activation == "gelu_pytorch_tanh"
    assert read("gemma3_text").windows == ((4096,) * 5 + (None,)) * 2
    assert read("gpt_neox").rope == Rope(fraction=0.25)
    assert read("smollm3").unrotated == (3, 7, 11)
    assert read("opt", ffn_dim=9, rope_scaling={"type": "none of these"}).rope is None
    opt = read(
        "opt", ffn_dim=96, intermediate_size=7, activation_function="gelu", enable_bias=False
    )
    assert (opt.intermediate_size, opt.activation, opt.rope) == (96, "gelu", None)
    assert (opt.qkv_bias, opt.output_bias, opt.mlp_bias) == (False, False, False)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "phi3",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope scaling 'linear' is not supported; give a model with one of: "
            "default, longrope, su, yarn",
        ),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 is not from 0 to 1"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "default"}},
            "rope_scaling beside rope_parameters without full_attention is not supported",
        ),
        ("gemma2", {"hidden_activation": "prelu"}, "hidden_activation 'prelu' is not supported"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention True is not",
        ),
        ("opt", {"ffn_dim": 9, "do_layer_norm_before": False}, "do_layer_norm_before False is not"),
        ("opt", {"ffn_dim": 9, "activation_function": "xielu"}, "activation_function 'xielu' is"),
        ("opt", {}, "key ffn_dim is missing"),
        ("smollm3", {"no_rope_layers": [1]}, "1 no_rope_layers for 12 layers"),
    ],
)
def test_what_the_decoder_has_no_part_for_is_refused(family, settings, message):
    with pytest.raises(UserError, match=f"^config.json: .*{message}") as e:
        read(family, **settings)
    assert "\n" not in str(e.value)


def test_there_is_a_reference_model_of_every_family(models):
    known = {json.loads(p.read_text())["model_type"] for p in models.glob("*/config.json")}
    assert known == set(FAMILIES)


X = np.linspace(-7, 7, 57)
SIGMOID = 1 / (1 + np.exp(-X))
GELU = X * scipy.special.ndtr(X)
TANH_GELU = 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", X * SIGMOID),
        ("gelu", GELU),
        ("gelu_pytorch_tanh", TANH_GELU),
        ("relu", np.maximum(X, 0)),
        ("relu2", np.maximum(X, 0) ** 2),
        ("relu6", np.clip(X, 0, 6)),
        ("leaky_relu", np.where(X > 0, X, 0.01 * X)),
        ("quick_gelu", X / (1 + np.exp(-1.702 * X))),
        ("mish", X * np.tanh(np.log1p(np.exp(X)))),
        ("hardswish", X * np.clip(X + 3, 0, 6) / 6),
        ("sigmoid", SIGMOID),
        ("tanh", np.tanh(X)),
        ("linear", X),
    ],
)
def test_activations_are_those_of_their_names(name, expected):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(X)), expected, rtol=2e-6, atol=1e-6)


def test_every_activation_of_a_config_is_computed():
    assert tuple(ACTIVATIONS) == config.ACTIVATIONS
