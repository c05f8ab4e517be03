"""The options of each family's config class in transformers, as data.

An axis is one option or several that belong together. Its choices are named changes of a
config.json with the keys of transformers 4. The first choice is the default. Each value is chosen
so that ignoring it changes the logits.
"""

from collections.abc import Mapping
from typing import Any

Choices = Mapping[str, Mapping[str, Any]]
Axes = Mapping[str, Choices]

LEFT_OUT = object()
"""Marks a key that is absent from the file."""

APART = {
    ("activation", "quick_gelu"),
    ("bidirectional", "True"),
    ("norms", "after"),
    ("norms", "before, none at the end"),
    ("norms", "without weights"),
    ("projection", "32"),
    ("heads", "no divisor"),
    ("heads", "null"),
    ("window", "0"),
    ("window", "null over windows"),
    ("rope", "su"),
    ("rope", "linear, which it lacks"),
    ("window", "listed and off"),
    ("scale", "144.5"),
    ("rope", "partial in scaling"),
}
"""Choices tried alone, because a refusal, or no model, hides other faults of the same case."""

POSITIONS = 64
LAYERS = 3
BASE: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 0.01,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def each(key: str, *values: Any) -> dict[str, dict[str, Any]]:
    """Returns the choices of one key; each value is the name of its choice."""
    return {("left out" if value is LEFT_OUT else str(value)): {key: value} for value in values}


def scaled(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **settings}}


HALF = 8
"""Number of rotated channel pairs in a head of 16 channels."""
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
    "long_factor": [2.0 + 0.3 * i for i in range(HALF)],
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"

ROPES: Choices = {
    "default": {},
    "theta": {"rope_theta": 300.0},
    "linear": {"rope_theta": 300.0, **scaled("linear", factor=2.5)},
    "linear by type": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": scaled("dynamic", factor=3.0),
    "dynamic, beyond": {"max_position_embeddings": 24, **scaled("dynamic", factor=3.0)},
    "yarn": {"rope_theta": 300.0, **scaled("yarn", factor=4.0, **{ORIGINAL: 16})},
    "yarn by type": {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 16}},
    "yarn, attention_factor": scaled("yarn", factor=4.0, attention_factor=0.7, **{ORIGINAL: 16}),
    "yarn, mscale": scaled("yarn", factor=4.0, mscale=0.8, mscale_all_dim=1.3, **{ORIGINAL: 16}),
    "yarn, betas": scaled("yarn", factor=4.0, beta_fast=9.0, beta_slow=2.0, **{ORIGINAL: 16}),
    "yarn, truncate": scaled("yarn", factor=4.0, truncate=False, **{ORIGINAL: 16}),
    "yarn, no original": scaled("yarn", factor=4.0),
    "llama3": {"rope_theta": 300.0, **scaled("llama3", **LLAMA3, **{ORIGINAL: 32})},
    "longrope": scaled("longrope", **LONG, factor=4.0, **{ORIGINAL: 16}),
    "longrope, attention_factor": scaled(
        "longrope", **LONG, attention_factor=1.7, **{ORIGINAL: 16}
    ),
    "longrope, no factor": scaled("longrope", **LONG, **{ORIGINAL: 16}),
    "partial in scaling": scaled("linear", factor=2.0, partial_rotary_factor=0.5),
    "mrope": scaled("default", mrope_section=[2, 3, 3]),
}
SOME_ROPES = {
    name: ROPES[name] for name in ("default", "theta", "linear", "yarn", "llama3", "dynamic")
}
HEADS: Choices = {
    "grouped": {},
    "one key": {"num_key_value_heads": 1},
    "as many keys": {"num_key_value_heads": 4},
    "null": {"num_key_value_heads": None},
    "left out": {"num_attention_heads": 16, "num_key_value_heads": LEFT_OUT},
    "no divisor": {"num_key_value_heads": 3},
}
HEADS_OF_QWEN = HEADS | {"left out": {"num_attention_heads": 32, "num_key_value_heads": LEFT_OUT}}
HEAD_DIM = each("head_dim", LEFT_OUT, 16, 24, None)
TIED = each("tie_word_embeddings", False, True, LEFT_OUT)
GATED = (
    "silu",
    "swish",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_python",
    "gelu_fast",
    "relu",
    "gelu_python_tanh",
    "gelu_accurate",
    "quick_gelu",
)
"""Names of the activation functions that the decoder supports, and one that it does not."""
OTHER_FUNCTIONS = (
    "gelu_10",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "relu2",
    "relu6",
    "sigmoid",
    "sqrtsoftplus",
    "tanh",
    "prelu",
    "xielu",
)
WITHOUT_EFFECT: Choices = {
    "none": {},
    "dropouts": {
        "attention_dropout": 0.4,
        "resid_pdrop": 0.4,
        "embd_pdrop": 0.4,
        "hidden_dropout": 0.4,
        "dropout": 0.4,
        "layerdrop": 0.0,
        "classifier_dropout": 0.4,
    },
    "as old files": {
        "_name_or_path": "somewhere/model",
        "architectures": None,
        "initializer_range": 0.5,
        "use_cache": False,
        "pretraining_tp": 1,
        "transformers_version": "4.31.0",
        "torchscript": False,
        "unsloth_fixed": True,
        "bos_token_id": None,
        "eos_token_id": [2, 3],
        "pad_token_id": 3,
    },
    "keys of other families": {
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 3,
        "no_rope_layers": [1, 0, 1],
        "qkv_bias": True,
        "use_qk_norm": True,
        "logit_scale": 2.0,
        "attention_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
    },
}
SLIDING, FULL = "sliding_attention", "full_attention"
EPS = each("rms_norm_eps", 0.01, 1e-6, 0.3, LEFT_OUT)
WINDOWS: Choices = {
    "off": {},
    "set and off": {"sliding_window": 11, "use_sliding_window": False, "max_window_layers": 1},
    "from layer 1": {"sliding_window": 11, "use_sliding_window": True, "max_window_layers": 1},
    "on every layer": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0},
    "on, layers left out": {"sliding_window": 7, "use_sliding_window": True},
    "null": {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
    "listed": {
        "sliding_window": 7,
        "use_sliding_window": True,
        "layer_types": [FULL, SLIDING, FULL],
    },
    "all full": {
        "sliding_window": 7,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": [FULL] * LAYERS,
    },
    "listed and off": {
        "sliding_window": 7,
        "use_sliding_window": False,
        "layer_types": [FULL, SLIDING, FULL],
    },
}
COMMON: Axes = {
    "tie": TIED,
    "heads": HEADS,
    "without effect": WITHOUT_EFFECT,
}
GEMMA_COMMON: Axes = {
    "tie": each("tie_word_embeddings", LEFT_OUT, True, False),
    "heads": HEADS,
    "head_dim": each("head_dim", 16, 24, LEFT_OUT),
    "attention_bias": each("attention_bias", LEFT_OUT, True),
    "eps": EPS,
    "bidirectional": each("use_bidirectional_attention", LEFT_OUT, None, False, True),
}
GEMMA_ACTIVATION = ("gelu_pytorch_tanh", "gelu", LEFT_OUT, "gelu_new", "gelu_fast", "silu", "relu")

AXES: Mapping[str, Axes] = {
    "llama": {
        "rope": ROPES,
        "activation": each("hidden_act", LEFT_OUT, *GATED),
        **COMMON,
        "head_dim": HEAD_DIM,
        "biases": {
            "none": {},
            "attention": {"attention_bias": True},
            "mlp": {"mlp_bias": True},
            "both": {"attention_bias": True, "mlp_bias": True},
        },
        "eps": EPS,
    },
    "mistral": {
        "window": each("sliding_window", None, 11, LEFT_OUT, 0)
        | {
            "stray switch": {"sliding_window": 11, "use_sliding_window": False},
            "layer_types": {"sliding_window": 11, "layer_types": [FULL, SLIDING, FULL]},
        },
        "rope": SOME_ROPES,
        "activation": each("hidden_act", "silu", "gelu", "gelu_new"),
        **COMMON,
        "head_dim": HEAD_DIM,
        "stray biases": each("attention_bias", LEFT_OUT, True),
        "eps": EPS,
    },
    "qwen2": {
        "window": WINDOWS,
        "rope": SOME_ROPES,
        "activation": each("hidden_act", "silu", "relu", "swish"),
        **COMMON,
        "heads": HEADS_OF_QWEN,
        "head_dim": each("head_dim", LEFT_OUT, 16, 24),
        "stray biases": {"none": {}, "attention": {"attention_bias": False, "qkv_bias": False}},
        "eps": EPS,
    },
    "qwen3": {
        "window": WINDOWS,
        "rope": SOME_ROPES,
        "activation": each("hidden_act", "silu", "gelu"),
        **COMMON,
        "heads": HEADS_OF_QWEN,
        "head_dim": each("head_dim", 16, 24, LEFT_OUT),
        "biases": each("attention_bias", LEFT_OUT, True, False),
        "eps": EPS,
    },
    "smollm3": {
        "rotated layers": {
            "left out": {},
            "listed": {"no_rope_layers": [1, 0, 1]},
            "null": {"no_rope_layers": None, "no_rope_layer_interval": 3},
            "every second": {"no_rope_layer_interval": 2},
            "none": {"no_rope_layers": [0, 0, 0]},
        },
        "window": {
            "left out": {},
            "off": {"use_sliding_window": False, "sliding_window": 7},
            "on": {"use_sliding_window": True, "sliding_window": 7},
            "on, null": {"use_sliding_window": True, "sliding_window": None},
            "all full": {"layer_types": [FULL] * LAYERS},
            "listed": {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": [SLIDING, FULL, SLIDING],
            },
            "listed and off": {"sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING]},
        },
        "rope": SOME_ROPES,
        **COMMON,
        "biases": {
            "none": {},
            "attention": {"attention_bias": True},
            "mlp": {"mlp_bias": True},
        },
        "eps": EPS,
    },
    "olmo2": {
        "rope": SOME_ROPES,
        "activation": each("hidden_act", "silu", "gelu", "swish"),
        **COMMON,
        "biases": each("attention_bias", LEFT_OUT, True),
        "eps": EPS,
    },
    "gemma": {
        "activation": each("hidden_act", *GEMMA_ACTIVATION),
        "hidden_activation": each("hidden_activation", LEFT_OUT, None, "gelu_pytorch_tanh", "gelu"),
        "rope": {name: SOME_ROPES[name] for name in ("default", "theta", "linear")},
        **GEMMA_COMMON,
        "without effect": WITHOUT_EFFECT,
    },
    "gemma2": {
        "activation": each("hidden_activation", *GEMMA_ACTIVATION),
        "stray activation": each("hidden_act", LEFT_OUT, "gelu", "silu"),
        "scale": each("query_pre_attn_scalar", 24, LEFT_OUT, 144.5),
        "window": each("sliding_window", 7, LEFT_OUT)
        | {
            "null over windows": {"sliding_window": None},
            "layer_types": {"sliding_window": 7, "layer_types": [FULL, SLIDING, FULL]},
            "all full": {"sliding_window": 7, "layer_types": [FULL] * LAYERS},
            "stray switch": {"sliding_window": 7, "use_sliding_window": False},
        },
        "attention cap": each("attn_logit_softcapping", 0.5, None, LEFT_OUT),
        "final cap": each("final_logit_softcapping", 3.0, None, LEFT_OUT),
        "rope": {name: SOME_ROPES[name] for name in ("default", "theta", "linear")},
        **GEMMA_COMMON,
    },
    "gemma3_text": {
        "activation": each("hidden_activation", *GEMMA_ACTIVATION),
        "scale": each("query_pre_attn_scalar", 24, LEFT_OUT, 144.5),
        "window": {
            "pattern": {"sliding_window": 7, "sliding_window_pattern": 2},
            "no pattern": {"sliding_window": 7},
            "layer_types": {"sliding_window": 7, "layer_types": [FULL, SLIDING, FULL]},
            "layer_types and pattern": {
                "sliding_window": 7,
                "sliding_window_pattern": 2,
                "layer_types": [FULL, SLIDING, FULL],
            },
            "left out": {"sliding_window_pattern": 2},
        },
        "attention cap": each("attn_logit_softcapping", LEFT_OUT, None, 0.5),
        "final cap": each("final_logit_softcapping", LEFT_OUT, 3.0, None),
        "rope": {
            "default": {},
            "both bases": {"rope_theta": 300.0, "rope_local_base_freq": 50.0},
            "linear": {"rope_theta": 300.0, **scaled("linear", factor=8.0)},
            "linear by type": {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "yarn": scaled("yarn", factor=4.0, **{ORIGINAL: 16}),
            "by kind": {
                "rope_parameters": {
                    FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0},
                    SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0},
                }
            },
            "by kind, one": {
                "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 300.0}}
            },
        },
        **GEMMA_COMMON,
    },
    "phi3": {
        "rope": {
            "default": {},
            "theta": {"rope_theta": 300.0},
            "longrope": {ORIGINAL: 16, "rope_scaling": {"type": "longrope", **LONG}},
            "longrope, short": {ORIGINAL: 64, "rope_scaling": {"rope_type": "longrope", **LONG}},
            "su": {ORIGINAL: 16, "rope_scaling": {"type": "su", **LONG}},
            "yarn": {ORIGINAL: 16, "rope_scaling": {"type": "yarn", **LONG}},
            "longrope, no original": {"rope_scaling": {"type": "longrope", **LONG}},
            "longrope, attention_factor": {
                ORIGINAL: 16,
                "rope_scaling": {"rope_type": "longrope", "attention_factor": 1.3, **LONG},
            },
            "linear, which it lacks": scaled("linear", factor=2.0),
            "half": {"partial_rotary_factor": 0.5},
            "one": {"partial_rotary_factor": 1.0},
            "half, longrope": {
                "partial_rotary_factor": 0.5,
                ORIGINAL: 16,
                "rope_scaling": {
                    "type": "longrope",
                    **{key: factors[: HALF // 2] for key, factors in LONG.items()},
                },
            },
        },
        "window": each("sliding_window", LEFT_OUT, 11, None, 2047),
        "activation": each("hidden_act", "silu", "gelu", "swish"),
        **COMMON,
        "stray biases": each("attention_bias", LEFT_OUT, False, True),
        "eps": EPS,
    },
    "gpt_neox": {
        "activation": each(
            "hidden_act", "gelu", "gelu_new", "gelu_fast", LEFT_OUT, "relu", "gelu_python", "silu"
        ),
        "fraction": each("rotary_pct", LEFT_OUT, 1.0, 0.5, 0.25),
        "base": each("rotary_emb_base", LEFT_OUT, 300, 10000),
        "rope": {
            "default": {},
            "linear": scaled("linear", factor=2.5),
            "linear by type": {"rope_scaling": {"type": "linear", "factor": 2.5}},
            "dynamic": scaled("dynamic", factor=3.0),
            "yarn": scaled("yarn", factor=4.0, **{ORIGINAL: 16}),
            "usual names": {"rope_theta": 300.0, "partial_rotary_factor": 1.0},
        },
        "residual": each("use_parallel_residual", LEFT_OUT, False, True),
        "biases": each("attention_bias", LEFT_OUT, False, True),
        "eps": each("layer_norm_eps", 0.01, 1e-5, 0.3, LEFT_OUT),
        "tie": TIED,
        "without effect": WITHOUT_EFFECT,
    },
    "opt": {
        "activation": each(
            "activation_function", "relu", "gelu", LEFT_OUT, "gelu_new", "quick_gelu"
        ),
        "biases": each("enable_bias", LEFT_OUT, False, True),
        "norms": {
            "before": {},
            "after": {"do_layer_norm_before": False},
            "before, none at the end": {"_remove_final_layer_norm": True},
            "without weights": {"layer_norm_elementwise_affine": False},
        },
        "projection": each("word_embed_proj_dim", LEFT_OUT, 64, 32),
        "tie": each("tie_word_embeddings", LEFT_OUT, True, False),
        "without effect": WITHOUT_EFFECT,
    },
}
"""Family to axis to choice to changes of config.json."""

LONGROPES = [name for rope in (ROPES, AXES["phi3"]["rope"]) for name in rope if "long" in name]
RULES = (
    {"tie": ("False",), "layout": ("base model", "no head")},
    *(
        {"tie": ("left out",), "layout": ("base model", "no head"), "family": (family,)}
        for family in ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gpt_neox")
    ),
    {"rope": (*LONGROPES, "yarn"), "heads": ("left out",)},
    {"rope": LONGROPES, "head_dim": ("24",)},
)
"""Excluded combinations that are no model: no stored head, or factors of the wrong length."""

FAMILY_BASE: Mapping[str, Mapping[str, Any]] = {
    "gpt_neox": {"num_key_value_heads": LEFT_OUT, "rms_norm_eps": LEFT_OUT},
    "opt": {
        "num_key_value_heads": LEFT_OUT,
        "intermediate_size": LEFT_OUT,
        "rms_norm_eps": LEFT_OUT,
        "ffn_dim": 96,
    },
}
"""Differences from `BASE` in every case of a family."""
