"""The supported model families: what a `model_type` implies, and where its checkpoints keep what.

A family is data: options of the one decoder, and the names of its parts. What a config.json leaves
out is filled in as transformers' class of that `model_type` does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Hugging Face's module paths of the decoder's parts: whole ones of those outside the layers,
    paths below `layers`.N of those in a layer. The defaults are Llama's, or most common.

    Tensors whose names end in one of `ignored` are no weights.
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
"""The head's module path in transformers 5, in every family. `Names.head` is how its tensor is
stored: GPT-NeoX's has the name that transformers 4 has for its module, too."""


ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a `model_type` implies and its config.json does not say.

    Attributes:
      names: of its parts.
      keys: what its config.json calls the usual key, where it has another name for it.
      defaults: values of keys that a file may leave out. Keys that most families do not have
        (soft caps, windows, rotated fractions) are read only if they are listed here.
      windows: which layers have the sliding window: a key of `config.WINDOWED`; None: no layer has.
      activations: names of activations that mean another one here.
      fixed: fields of `DecoderConfig` that no key decides.
      only: keys of which the decoder has some values alone.
      ropes: `rope_type` to the kind of `Rope` that it is.
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
"""A norm before and after both halves of a layer."""

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
        activations={"gelu": "gelu_pytorch_tanh"},  # as files of the first release mean it
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
        # the names that longrope had in files of the first releases
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
            # causal masks in old files
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
"""The supported values of `model_type`; a family whose parts the decoder has is a row here."""

EMBEDDINGS = frozenset(family.names.embed for family in FAMILIES.values())
"""The embeddings' module paths: adapters of these are looked up, and stored under other names."""
