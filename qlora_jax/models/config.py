"""What a Llama-like decoder looks like, read from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    `kind` is default, linear (positions divided by `factor`) or llama3 (Llama 3.1's
    frequency-dependent division). The last three fields are read by llama3 only.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shapes and switches of one decoder. `windows[i]` is layer i's sliding window, or None."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: Rope
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` implies and its config.json does not say."""

    qkv_bias: bool | None = None  # None: the file's `attention_bias`
    output_bias: bool | None = None
    window_by_default: int | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, output_bias=False, window_by_default=4096),
    "qwen2": Family(qkv_bias=True, output_bias=False),
}
"""The supported values of `model_type`; a family whose parts the decoder has is a row here."""

ROPE_KINDS = ("default", "linear", "llama3")


def from_hugging_face(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """Reads the config.json of transformers 4 or 5.

    Args:
      raw: the parsed file.
      where: the file's name, for messages.

    Raises:
      UserError: a model type or a rope scaling that is not supported, or a missing key.
    """
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type {raw.get('model_type')!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{where}: hidden_act {raw['hidden_act']!r} is not supported; supported: silu"
        )
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        layers = int(raw["num_hidden_layers"])
        attention_bias = bool(raw.get("attention_bias", False))
        return DecoderConfig(
            family=kind,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            max_positions=int(raw.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, where),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=attention_bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            windows=_windows(raw, family, layers),
        )
    except KeyError as e:
        raise UserError(f"{where}: key {e.args[0]} is missing") from None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{where}: a value cannot be used: {e}") from None


def to_hugging_face(config: DecoderConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5, and `from_hugging_face`, read; without windows."""
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling = {
            "rope_type": rope.kind,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    return {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        "sliding_window": None,
    }


def _windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window", family.window_by_default)
    if not window or not raw.get("use_sliding_window", family.window_by_default is not None):
        return (None,) * layers
    if kinds := raw.get("layer_types"):
        if len(kinds) != layers:
            raise ValueError(f"{len(kinds)} layer_types for {layers} layers")
        return tuple(int(window) if k == "sliding_attention" else None for k in kinds)
    first = int(raw.get("max_window_layers", 0))  # Qwen2: the layers below use full attention
    return tuple(int(window) if i >= first else None for i in range(layers))


def _rope(raw: Mapping[str, Any], where: str) -> Rope:
    # transformers 5 holds everything in rope_parameters; 4 had rope_theta beside rope_scaling.
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UserError(
            f"{where}: rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=float(scaling["factor"]))
    return Rope(
        theta=theta,
        kind=kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_positions=int(scaling["original_max_position_embeddings"]),
    )
