"""The shapes and switches of a decoder, read from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.models.families import FAMILIES, LLAMA, Names
from qlora_jax.models.rope_config import Rope, read_ropes
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shapes and switches of one decoder.

    Attributes:
      windows: length of the sliding window of each layer; None: the layer has no window.
      norm: kind of norm. "rms" rounds to the compute dtype before it multiplies by the weight;
        "rms_float32" multiplies before it rounds; "rms_offset" does the same with 1 + weight
        (Gemma); "layer" is LayerNorm, with mean and bias.
      rope: rotary position embedding; None: the decoder rotates nothing.
      local_rope: rope of the layers with a window; None: they use `rope`.
      unrotated: indices of the layers without rotation.
      positions_before: number of rows before position 0 in the learned position table; None: the
        decoder has no such table.
      scaled_embeddings: whether embeddings are multiplied by the square root of the hidden size.
      qk_norm: "head" normalizes each head of q and k alone, "all" normalizes all heads together;
        None: q and k are not normalized.
      fused_qkv: order of q, k and v in their common linear: "concatenated", or "interleaved" head
        by head; None: q, k and v are three linears.
      fused_gate_up: whether gate and up are one linear.
      attention_scale: factor on scores; None: head_dim^-1/2.
      attention_softcap, final_softcap: c in c·tanh(x/c) for scores and for logits; None: no cap.
      pre_norms, post_norms: whether the inputs, and the outputs, of attention and MLP are
        normalized.
      gated: whether the MLP is down(activation(gate) · up); False: down(activation(up)).
      activation: name of the activation function, one of `ACTIVATIONS`.
      parallel_residual: whether attention and MLP read the same x.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: Rope | None
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    names: Names = LLAMA
    norm: str = "rms"
    local_rope: Rope | None = None
    unrotated: tuple[int, ...] = ()
    positions_before: int | None = None
    scaled_embeddings: bool = False
    qk_norm: str | None = None
    fused_qkv: str | None = None
    fused_gate_up: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    pre_norms: bool = True
    post_norms: bool = False
    gated: bool = True
    activation: str = "silu"
    parallel_residual: bool = False

    @property
    def longest(self) -> int:
        """Largest number of positions of a sequence.

        It is `max_positions`, or the length that the rope scaling is made for if that is larger.
        """
        return max([self.max_positions, *(rope.reach for rope in self._ropes)])

    @property
    def longest_cached(self) -> int:
        """Largest number of positions of a sequence in generation with a KV cache.

        The cache holds rotated keys. So the frequencies must not change while the sequence grows.
        """
        return min([self.longest, *(r.original_positions for r in self._ropes if r.varies)])

    @property
    def varying_rope(self) -> bool:
        """Whether the frequencies of a rope depend on the length of the sequence."""
        return any(rope.varies for rope in self._ropes)

    @property
    def _ropes(self) -> list[Rope]:
        return [rope for rope in (self.rope, self.local_rope) if rope is not None]


ACTIVATIONS = (
    *("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "relu6", "leaky_relu"),
    *("quick_gelu", "mish", "hardswish", "sigmoid", "tanh", "linear"),
)
ALIASES = {"swish": "silu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_pytorch_tanh"
)
"""Other names that transformers has for functions of `ACTIVATIONS`."""

WINDOWED: Mapping[str, Callable[[int, Mapping[str, Any]], bool]] = {
    "all": lambda layer, values: True,
    "late": lambda layer, values: layer >= int(values.get("max_window_layers") or 0),
    "patterned": lambda layer, values: (layer + 1) % int(values["sliding_window_pattern"]) != 0,
    "unrotated": lambda layer, values: (
        bool(values["use_sliding_window"]) and layer in values["unrotated"]
    ),
}
"""Value of `Family.windows` to a function of (layer index, config values): has the layer a window?

If a file has `layer_types`, that list decides instead.
"""


MOST_LAYERS = 4096
"""Largest allowed number of layers.

The reader makes lists of this length before it opens the weights, so a damaged file needs a limit.
"""


def from_hugging_face(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """Returns the config that a config.json of transformers 4 or 5 describes.

    Args:
      raw: content of the file.
      where: name of the file, for messages.

    Raises:
      UserError: a model type, an activation, a rope scaling or another value is not supported, a
        value cannot be used, or a key is missing.
    """
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type {raw.get('model_type')!r} is not supported; "
            f"give a model of a supported type: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    for key, allowed in family.only.items():
        _require(where, key, raw.get(key, allowed[0]), allowed)
    values: dict[str, Any] = {**family.defaults, **raw}
    own = {usual: values[key] for usual, key in family.keys.items() if key in values}
    values = {k: v for k, v in values.items() if k not in family.keys} | own
    activation = values.setdefault("hidden_act", "silu")
    activation = (ALIASES | dict(family.activations)).get(str(activation), activation)
    values["hidden_act"] = activation
    _require(where, family.keys.get("hidden_act", "hidden_act"), activation, ACTIVATIONS)
    try:
        return DecoderConfig(**{**_fields(kind, values, where), **family.fixed})
    except KeyError as e:
        key = family.keys.get(e.args[0], e.args[0])
        raise UserError(
            f"{where}: key {key} is missing; add it with the value of the model's publisher"
        ) from None
    except UserError:
        raise
    except (AttributeError, OverflowError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(
            f"{where}: a value cannot be used: {e}; correct it, or download the file again"
        ) from None


def _require(where: str, key: str, value: Any, values: tuple[Any, ...]) -> None:
    if value not in values:
        known = ", ".join("null" if v is None else str(v) for v in values)
        raise UserError(
            f"{where}: {key} {value!r} is not supported; give a model with one of: {known}"
        )


def _fields(kind: str, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    family = FAMILIES[kind]
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    layers = int(raw["num_hidden_layers"])
    if not 1 <= layers <= MOST_LAYERS:
        raise UserError(
            f"{where}: num_hidden_layers {layers} is not from 1 to {MOST_LAYERS}; correct it"
        )
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}; "
            "correct one of them"
        )
    attention_bias = bool(raw.get("attention_bias", False))

    def listed(key: str) -> Any:
        """Returns the value of a key, or None if the family does not have this key."""
        return raw.get(key) if family.keys.get(key, key) in family.defaults else None

    scale = listed("query_pre_attn_scalar")
    unrotated = _unrotated(listed, layers)
    head_dim = int(raw.get("head_dim") or hidden // heads)
    positions = int(raw.get("max_position_embeddings", 2048))
    rope = local_rope = None
    if "rope" not in family.fixed:
        rope, local_rope = read_ropes(raw, family, head_dim, positions, where)
    return {
        "family": kind,
        "names": family.names,
        "vocab_size": int(raw["vocab_size"]),
        "hidden_size": hidden,
        "intermediate_size": int(raw["intermediate_size"]),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": positions,
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "rope": rope,
        "local_rope": local_rope,
        "unrotated": unrotated,
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "windows": _windows(raw, listed, family.windows, unrotated, layers),
        "activation": raw["hidden_act"],
        "attention_scale": None if scale is None else float(scale) ** -0.5,
        "attention_softcap": _float(listed("attn_logit_softcapping")),
        "final_softcap": _float(listed("final_logit_softcapping")),
        "parallel_residual": bool(listed("use_parallel_residual")),
    }


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _windows(
    raw: Mapping[str, Any],
    listed: Callable[[str], Any],
    rule: str | None,
    unrotated: tuple[int, ...],
    layers: int,
) -> tuple[int | None, ...]:
    window = listed("sliding_window")
    if rule is None or not window or (rule == "late" and not listed("use_sliding_window")):
        return (None,) * layers
    kinds = raw.get("layer_types")
    if not kinds:
        values = {**raw, "unrotated": unrotated}
        has = [WINDOWED[rule](layer, values) for layer in range(layers)]
    elif len(kinds) == layers:
        has = [kind == "sliding_attention" for kind in kinds]
    else:
        raise ValueError(f"{len(kinds)} layer_types for {layers} layers")
    return tuple(int(window) if windowed else None for windowed in has)


def _unrotated(listed: Callable[[str], Any], layers: int) -> tuple[int, ...]:
    rotated = listed("no_rope_layers")  # 1 for a layer with rotation, else 0
    if rotated is None:
        every = listed("no_rope_layer_interval")
        return tuple(i for i in range(layers) if every and not (i + 1) % int(every))
    if len(rotated) != layers:
        raise ValueError(f"{len(rotated)} no_rope_layers for {layers} layers")
    return tuple(i for i, r in enumerate(rotated) if not r)
