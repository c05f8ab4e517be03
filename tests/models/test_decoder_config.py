import json
import math

import pytest

from qlora_jax.models.config import FAMILIES, Rope, from_hugging_face
from qlora_jax.runtime.errors import UserError

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def read(model_type="llama", **settings):
    heads = {} if model_type == "llama" else {"num_key_value_heads": 4}
    return from_hugging_face({"model_type": model_type} | SHAPE | heads | settings, "config.json")


def test_what_a_file_leaves_out():
    config = read()
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.max_positions, config.norm_eps) == (2048, 1e-6)
    assert config.rope == Rope(theta=10000.0)
    assert not config.tie_embeddings
    assert config.windows == (None,) * 4


def test_what_a_file_says():
    config = read(
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        mlp_bias=True,
    )
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (256, 64, 128)
    assert (config.num_layers, config.num_heads) == (4, 4)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (2, 32, 512)
    assert (config.norm_eps, config.tie_embeddings, config.mlp_bias) == (1e-5, True, True)


@pytest.mark.parametrize(
    ("family", "attention_bias", "qkv", "output"),
    [
        ("llama", True, True, True),
        ("llama", False, False, False),
        ("mistral", True, False, False),
        ("qwen2", False, True, False),
    ],
)
def test_biases_of_a_family(family, attention_bias, qkv, output):
    config = read(family, attention_bias=attention_bias)
    assert (config.qkv_bias, config.output_bias) == (qkv, output)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            {"rope_theta": 5e5},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            Rope(theta=5e5),
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}},
            Rope(theta=1e6, kind="linear", factor=4.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"} | LLAMA3},
            Rope(
                theta=5e5,
                kind="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_positions=8192,
            ),
        ),
        ({"rope_scaling": None}, {"rope_parameters": None}, Rope()),
    ],
)
def test_rope_as_transformers_4_and_5_write_it(old, new, expected):
    assert read(**old).rope == read(**new).rope == expected


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LINEAR},
            Rope(kind="linear", factor=4.0),
        ),
        (
            {"rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_scaling": {}},
            Rope(theta=5e5, kind="linear", factor=4.0),
        ),
        ({"rope_theta": 3.0, "rope_scaling": {"rope_theta": 7e3}}, Rope(theta=7e3)),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, Rope()),
        ({"partial_rotary_factor": 0.5}, Rope()),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, Rope()),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            Rope(
                kind="yarn", factor=4.0, original_positions=32, attention_factor=1.138629436111989
            ),
        ),
        (
            {"rope_scaling": YARN | {"factor": None, "attention_factor": 0.5, "beta_fast": 0}},
            Rope(kind="yarn", factor=32.0, original_positions=64, attention_factor=0.5),
        ),
        (
            {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}},
            Rope(
                kind="yarn",
                factor=4.0,
                original_positions=64,
                truncate=False,
                attention_factor=0.9405715251010841,
            ),
        ),
        (
            {"rope_scaling": LINEAR | {"rope_type": "dynamic"}},
            Rope(kind="dynamic", factor=4.0, original_positions=2048),
        ),
        (
            {"rope_scaling": LONGROPE | {"factor": 8, "original_max_position_embeddings": 64}},
            Rope(
                kind="longrope",
                original_positions=64,
                short=(1.0,) * 8,
                long=(2.0,) * 8,
                attention_factor=1.224744871391589,
            ),
        ),
    ],
)
def test_the_precedence_of_rope_settings_is_transformers(settings, expected):
    """Expects values of transformers 5.24.0; tests/parity/test_live_rope.py runs the comparison."""
    assert read(**settings).rope == expected


@pytest.mark.parametrize(
    ("settings", "longest", "cached"),
    [
        ({}, 2048, 2048),
        ({"rope_scaling": LINEAR}, 2048, 2048),
        ({"rope_scaling": YARN}, 2048, 2048),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 1024}}, 4096, 4096),
        ({"rope_scaling": LINEAR | {"rope_type": "dynamic"}}, 8192, 2048),
        ({"rope_scaling": LONGROPE | {"original_max_position_embeddings": 64}}, 2048, 64),
    ],
)
def test_how_long_a_sequence_may_be(settings, longest, cached):
    config = read(**settings)
    assert (config.max_positions, config.longest, config.longest_cached) == (2048, longest, cached)


@pytest.mark.parametrize(
    ("family", "settings", "windows"),
    [
        ("mistral", {}, (4096,) * 4),
        ("mistral", {"sliding_window": 8}, (8,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("qwen2", {"sliding_window": 8}, (None,) * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, (None,) * 4),
        (
            "qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            "qwen2",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
        ("llama", {"sliding_window": 8}, (None,) * 4),
    ],
)
def test_windows(family, settings, windows):
    assert read(family, **settings).windows == windows


def test_reference_models_are_read(models):
    for name in ("llama", "mistral", "qwen2", "mistral_window", "qwen2_window"):
        raw = json.loads((models / name / "config.json").read_text())
        config = from_hugging_face(raw, name)
        assert config.family in FAMILIES
        assert config.num_layers == len(config.windows) == raw["num_hidden_layers"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type 'gpt2' is not supported; .*llama, mist"),
        ({"model_type": None}, "model_type None is not supported"),
        (
            {"hidden_act": "xielu"},
            "json: hidden_act 'xielu' is not supported; give a model with one of: silu",
        ),
        (
            {"rope_scaling": {"type": "ntk", "factor": 4}},
            "rope_scaling: rope scaling 'ntk' is not supported; give a model with one of: "
            "default, linear, dyn",
        ),
        ({"rope_parameters": {"rope_type": None}}, "rope scaling None is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "config.json: key factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "config.json: key factor is missing"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "config.json: key short_factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            "rope_scaling: factor '4' is not a n",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor 0 is not supported; give more"),
        ({"rope_theta": None}, "rope_parameters: rope_theta None is not a number"),
        ({"rope_theta": math.inf}, "rope_theta inf is not a finite number"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4}}},
            "rope_parameters.full_attention is not supported: this model_type has one rope",
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 4}},
            "partial_rotary_factor 0.5 beside a rope scaling is not supported",
        ),
        (
            {"rope_scaling": LONGROPE | {"short_factor": [1.0] * 4}},
            "short_factor is not a list of 8 numbers",
        ),
        ({"rope_scaling": LONGROPE | {"long_factor": [0] * 8}}, "long_factor holds 0.0; give more"),
        (
            {"rope_scaling": {"type": "llama3"} | LLAMA3 | {"high_freq_factor": 1}},
            "high_freq_factor 1 is not above low_freq_factor 1",
        ),
        ({"rope_scaling": {"type": "linear"}}, "config.json: key factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "key low_freq_factor is missing",
        ),
    ],
)
def test_errors(settings, message):
    with pytest.raises(UserError, match=message):
        from_hugging_face({"model_type": "llama"} | SHAPE | settings, "config.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_attention_heads": 0},
        {"rope_scaling": "linear"},
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"]},
    ],
)
def test_a_value_without_sense_is_an_error(settings):
    raw = {"model_type": "qwen2", "num_key_value_heads": 4} | SHAPE | settings
    with pytest.raises(UserError, match=r"config.json: a value cannot be used: "):
        from_hugging_face(raw, "config.json")


@pytest.mark.parametrize("value", [None, "many", []])
def test_a_value_of_another_type_is_an_error(value):
    raw = {"model_type": "llama"} | SHAPE | {"num_hidden_layers": value}
    with pytest.raises(UserError, match=r"config.json: a value cannot be used: .*int"):
        from_hugging_face(raw, "config.json")


@pytest.mark.parametrize("key", sorted(SHAPE))
def test_a_missing_key_is_named(key):
    raw = {"model_type": "llama"} | SHAPE
    del raw[key]
    with pytest.raises(UserError, match=f"config.json: key {key} is missing"):
        from_hugging_face(raw, "config.json")


@pytest.mark.parametrize(
    ("family", "heads"),
    [("mistral", 8), ("qwen2", 32), ("qwen3", 32), ("smollm3", 4), ("gemma", 16), ("gemma2", 4)],
)
def test_key_value_heads_that_a_file_leaves_out_are_those_of_the_familys_class(family, heads):
    raw = {"model_type": family} | SHAPE | {"num_attention_heads": 32}
    assert from_hugging_face(raw, "config.json").num_kv_heads == heads
    assert from_hugging_face(raw | {"num_key_value_heads": None}, "c").num_kv_heads == 32


def test_key_value_heads_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(UserError, match="num_key_value_heads 3 does not divide num_attention_head"):
        read(num_key_value_heads=3)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("swish", "silu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_pytorch_tanh"),
        ("gelu_fast", "gelu_pytorch_tanh"),
    ],
)
def test_activations_have_other_names(name, same):
    assert read(hidden_act=name) == read(hidden_act=same)
    with pytest.raises(UserError, match="hidden_act 'prelu' is not supported"):
        read(hidden_act="prelu")


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "settings", "windows"),
    [
        ("mistral", {"use_sliding_window": False}, (9, 9, 9, 9)),
        ("mistral", {"layer_types": [FULL, SLIDING] * 2}, (None, 9, None, 9)),
        ("phi3", {}, (9, 9, 9, 9)),
        ("qwen2", {"layer_types": [SLIDING] * 4}, (None,) * 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 9)),
        ("gemma2", {"use_sliding_window": False}, (9, None, 9, None)),
        ("gemma3_text", {"layer_types": [FULL, SLIDING, FULL, SLIDING]}, (None, 9, None, 9)),
        ("smollm3", {}, (None,) * 4),
        ("smollm3", {"layer_types": [SLIDING, FULL, FULL, SLIDING]}, (9, None, None, 9)),
        ("smollm3", {"use_sliding_window": True}, (None, None, None, 9)),
        ("smollm3", {"use_sliding_window": True, "sliding_window": None}, (None,) * 4),
        ("llama", {"layer_types": [SLIDING] * 4}, (None,) * 4),
    ],
)
def test_windows_are_those_of_transformers(family, settings, windows):
    """Expects the windows of transformers 5.24; its AutoModel also reads Mistral's layer_types."""
    assert read(family, **{"sliding_window": 9} | settings).windows == windows
