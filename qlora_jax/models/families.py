"""The supported model families: settings that a `model_type` implies, and names of its weights.

A family is data: options of the one decoder, and the names of its parts. Keys that are missing in
a config.json get the defaults of transformers' config class of that `model_type`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The Hugging Face module paths of the decoder's parts.

    A part outside the layers has its whole path. A part of a layer has its path below `layers`.N.
    The defaults are Llama's paths; parts that Llama lacks have their most common paths.

    Attributes:
      ignored: endings of tensor names; a tensor whose name ends so is not a weight.
    """

    embed: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)

    attention_norm: str = "input_layernorm"
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    qkv_proj: str = "self_attn.qkv_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o_proj: str = "self_attn.o_proj"
    attention_post_norm: str = "post_attention_layernorm"

    mlp_norm: str = "post_attention_layernorm"
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    gate_up_proj: str = "mlp.gate_up_proj"
    down_proj: str = "mlp.down_proj"
    mlp_post_norm: str = "post_feedforward_layernorm"


LLAMA = Names()

HEAD = "lm_head"
"""Module path of the head in transformers 5, for every family. `Names.head` is the name in files,
which differs for GPT-NeoX: embed_out, as in transformers 4."""


ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The settings that a `model_type` implies, and that its config.json does not contain.

    Attributes:
      names: module paths of the decoder's parts.
      keys: usual key to the name that this family's config.json has for it, where they differ.
      defaults: values of keys that a file may leave out. Keys that most families do not have
        (soft caps, windows, rotated fractions) are read only if they are listed here.
      windows: key of `config.WINDOWED`, the rule that gives layers a sliding window; None: no
        layer has a window.
      activations: name of an activation in this family's files to the activation that it means.
      fixed: fields of `DecoderConfig` that have the same value in every model of the family.
      only: key to the values of it that the decoder supports.
      ropes: `rope_type` to the kind of `Rope`.
    """

    names: Names = LLAMA
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: str | None = None
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ropes: Mapping[str, str] = dataclasses.field(default_factory=lambda: {k: k for k in ROPES})


QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
GEMMA = {"norm": "rms_offset", "scaled_embeddings": True}
CAUSAL = {"use_bidirectional_attention": (None, False)}
SANDWICH = Names(mlp_norm="pre_feedforward_layernorm")
"""Names of a layer that has a norm before and after attention, and before and after the MLP."""

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        windows="all",
        fixed={"qkv_bias": False, "output_bias": False},
    ),
    "qwen2": Family(
        defaults=QWEN,
        windows="late",
        fixed={"qkv_bias": True, "output_bias": False},
    ),
    "qwen3": Family(
        defaults={"head_dim": 128, **QWEN},
        windows="late",
        fixed={"qk_norm": "head"},
    ),
    "smollm3": Family(
        defaults={
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        windows="unrotated",
    ),
    "olmo2": Family(
        defaults={"rms_norm_eps": 1e-5},
        fixed={"norm": "rms_float32", "qk_norm": "all", "pre_norms": False, "post_norms": True},
    ),
    "gemma": Family(
        defaults={
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "num_key_value_heads": 16,
            "tie_word_embeddings": True,
        },
        fixed=GEMMA,
        activations={"gelu": "gelu_pytorch_tanh"},  # files of the first release say gelu
        only=CAUSAL,
    ),
    "gemma2": Family(
        names=SANDWICH,
        keys={"hidden_act": "hidden_activation"},
        defaults={
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
        },
        windows="patterned",
        fixed={**GEMMA, "post_norms": True},
        only=CAUSAL,
    ),
    "gemma3_text": Family(
        names=SANDWICH,
        keys={"hidden_act": "hidden_activation"},
        defaults={
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": None,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        windows="patterned",
        fixed={**GEMMA, "post_norms": True, "qk_norm": "head"},
        only=CAUSAL,
    ),
    "phi3": Family(
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
        },
        windows="all",
        only={"layer_types": (None,)},
        fixed={
            "fused_qkv": "concatenated",
            "fused_gate_up": True,
            "qkv_bias": False,
            "output_bias": False,
            "mlp_bias": False,
        },
        # files of the first releases have other names for longrope
        ropes={
            "default": "default",
            "longrope": "longrope",
            "su": "longrope",
            "yarn": "longrope",
        },
    ),
    "gpt_neox": Family(
        names=Names(
            embed="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            # old files hold causal masks under these names
            ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
            qkv_proj="attention.query_key_value",
            o_proj="attention.dense",
            up_proj="mlp.dense_h_to_4h",
            down_proj="mlp.dense_4h_to_h",
        ),
        keys={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_pct": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        fixed={"norm": "layer", "gated": False, "fused_qkv": "interleaved", "mlp_bias": True},
    ),
    "opt": Family(
        names=Names(
            embed="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            layers="model.decoder.layers",
            norm="model.decoder.final_layer_norm",
            attention_norm="self_attn_layer_norm",
            o_proj="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            up_proj="fc1",
            down_proj="fc2",
        ),
        keys={
            "intermediate_size": "ffn_dim",
            "hidden_act": "activation_function",
            "attention_bias": "enable_bias",
            "mlp_bias": "enable_bias",
        },
        defaults={
            "activation_function": "relu",
            "enable_bias": True,
            "tie_word_embeddings": True,
        },
        fixed={
            "norm": "layer",
            "norm_eps": 1e-5,
            "gated": False,
            "rope": None,
            "positions_before": 2,
        },
        only={
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
    ),
}
"""Supported `model_type` to its family. To add a family that needs no new part, add a row."""

EMBEDDINGS = frozenset(family.names.embed for family in FAMILIES.values())
"""Module paths of the embedding in all families. Its adapter looks rows up instead of multiplying,
and PEFT has other names for its tensors."""
