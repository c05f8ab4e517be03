"""Converts the config of a decoder to a config.json, for models that were not read from one."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig, Rope, from_hugging_face
from qlora_jax.models.families import FAMILIES
from qlora_jax.runtime.errors import UserError

CLASSES = {
    "gpt_neox": "GPTNeoX",
    "gemma3_text": "Gemma3",
    "opt": "OPT",
    "smollm3": "SmolLM3",
}
"""Family to the name in its transformers class, if that is not the capitalized family name."""

LISTED = {
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_parallel_residual",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "sliding_window",
    "use_sliding_window",
    "no_rope_layers",
}
"""Keys that are written only for families that list them in `Family.defaults`."""


def _default(rope: Rope) -> None:
    return None


def _linear(rope: Rope) -> dict[str, Any]:
    return {"rope_type": rope.kind, "factor": rope.factor}


def _llama3(rope: Rope) -> dict[str, Any]:
    return {
        **_linear(rope),
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_positions,
    }


def _yarn(rope: Rope) -> dict[str, Any]:
    return {
        **_linear(rope),
        "original_max_position_embeddings": rope.original_positions,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
        "attention_factor": rope.attention_factor,
    }


def _longrope(rope: Rope) -> dict[str, Any]:
    return {
        "rope_type": rope.kind,
        "original_max_position_embeddings": rope.original_positions,
        "short_factor": list(rope.short),
        "long_factor": list(rope.long),
        "attention_factor": rope.attention_factor,
    }


SCALINGS: Mapping[str, Callable[[Rope], dict[str, Any] | None]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Kind of a rope to the function that returns its `rope_scaling`."""


def to_hugging_face(config: DecoderConfig) -> dict[str, Any]:
    """Returns a config.json that transformers 4 and 5 and `from_hugging_face` can read.

    Raises:
      UserError: `from_hugging_face` would read another config from it.
    """
    family = FAMILIES[config.family]
    rope = config.rope or Rope()
    window = next((w for w in config.windows if w), None)
    usual: dict[str, Any] = {
        "architectures": [CLASSES.get(config.family, config.family.capitalize()) + "ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": SCALINGS[rope.kind](rope),
        "partial_rotary_factor": rope.fraction,
        "rope_local_base_freq": config.local_rope and config.local_rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.activation,
        "query_pre_attn_scalar": config.attention_scale and round(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "use_parallel_residual": config.parallel_residual,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "no_rope_layers": [int(i not in config.unrotated) for i in range(config.num_layers)],
    }
    # transformers reads a Mistral config with layer_types as another model_type.
    if window is not None and (family.windows != "all" or None in config.windows):
        kinds = ("full_attention", "sliding_attention")
        usual["layer_types"] = [kinds[w is not None] for w in config.windows]
    if rope.kind == "longrope":
        # Phi-3, and in transformers 4 other families too, read this key at the top level.
        usual["original_max_position_embeddings"] = rope.original_positions
    named = {family.keys.get(key, key): (key, value) for key, value in usual.items()}
    raw = {k: v for k, (key, v) in named.items() if key not in LISTED or k in family.defaults}
    if from_hugging_face(raw, "config.json") != config:
        raise UserError(
            f"this {config.family} model's shapes cannot be written as a config.json; give a "
            "Hugging Face folder, whose config.json is kept"
        )
    return raw
