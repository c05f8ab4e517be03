"""A .gguf file's metadata as the config of a decoder."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.formats.gguf.architectures import ARCHITECTURES, Architecture
from qlora_jax.formats.gguf.tensors import read_tensor
from qlora_jax.models.config import DecoderConfig, Rope, from_hugging_face
from qlora_jax.models.families import FAMILIES, Family
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import GgufHeader, GgufTensor

ROPE_TABLE = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The rope settings of Llama 3.1 to 3.3; a GGUF file holds only the table computed from them."""

OPTIONS = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
    "use_parallel_residual": "use_parallel_residual",
}
"""Metadata to the key of a config.json; a family reads those it has."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a file about its model.

    Attributes:
      path: the file, for messages.
      architecture: `general.architecture`.
      values: key without the architecture's name to value.
    """

    path: Path
    architecture: str
    values: Mapping[str, Any]

    @property
    def kind(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def window(self) -> Any:
        """The length of sliding windows, or None."""
        return self.values.get("attention.sliding_window") or None

    @property
    def family(self) -> str:
        """The `model_type`: Mistral is llama's architecture with a window."""
        return "mistral" if self.window and self.kind.family == "llama" else self.kind.family

    def number(self, key: str, default: Any = None) -> Any:
        """Returns a positive number.

        Raises:
          UserError: the value is not a positive number.
        """
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(
                f"{self.path}: metadata {self.architecture}.{key} is {value!r}; expected a "
                "positive number"
            )
        return value


def config_of(header: GgufHeader, found: Mapping[str, GgufTensor], path: Path) -> DecoderConfig:
    """Returns the config of a file's model.

    Args:
      header: the file's header; its architecture is one of `ARCHITECTURES`.
      found: Hugging Face's names to tensors.
      path: the file.

    Raises:
      UserError: metadata that is missing, malformed or not supported.
    """
    architecture = header.metadata["general.architecture"]
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    metadata = Metadata(path, architecture, values)
    family = FAMILIES[metadata.family]
    head_dim, rotated = _head_sizes(metadata, family)
    raw = _keys(metadata, family, found, head_dim)
    config = from_hugging_face({family.keys.get(k, k): v for k, v in raw.items()}, str(path))
    if metadata.window and family.windows not in ("all", "patterned"):
        raise UserError(
            f"{path}: metadata {architecture}.attention.sliding_window is {metadata.window}; "
            f"sliding windows of architecture {architecture} are not supported"
        )
    rope = _rope(metadata, header, head_dim)
    names = family.names
    first = f"{names.layers}.0"
    qkv = names.qkv_proj if config.fused_qkv else names.q_proj
    return dataclasses.replace(
        config,
        rope=dataclasses.replace(rope, fraction=rotated / head_dim),
        qkv_bias=f"{first}.{qkv}.bias" in found,
        output_bias=f"{first}.{names.o_proj}.bias" in found,
        mlp_bias=f"{first}.{names.down_proj}.bias" in found,
    )


def _head_sizes(metadata: Metadata, family: Family) -> tuple[int, int]:
    """Features of a head, and how many of them are rotated."""
    number = metadata.number
    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    rotated = number("rope.dimension_count", head_dim)
    partial = "partial_rotary_factor" in {*family.keys, *family.defaults}
    if rotated != head_dim and not partial:
        raise UserError(
            f"{metadata.path}: {rotated} of {head_dim} dimensions per head are rotated; "
            f"architecture {metadata.architecture} is supported with all of them"
        )
    return head_dim, rotated


def _keys(
    metadata: Metadata, family: Family, found: Mapping[str, GgufTensor], head_dim: int
) -> dict[str, Any]:
    """The metadata under the keys of a config.json."""
    number, names = metadata.number, family.names
    embedding = found.get(f"{names.embed}.weight")
    if embedding is None:
        raise UserError(f"{metadata.path}: no token_embd.weight in it; download it again")
    heads, hidden = number("attention.head_count"), number("embedding_length")
    layers = number("block_count")
    query = hidden // heads if layers == metadata.kind.wide_scale else head_dim
    norm = "layer_norm_epsilon" if family.fixed.get("norm") == "layer" else "layer_norm_rms_epsilon"
    raw = {
        "model_type": metadata.family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number(f"attention.{norm}"),
        "tie_word_embeddings": f"{names.head}.weight" not in found,
        "query_pre_attn_scalar": query,
    } | {key: metadata.values[said] for said, key in OPTIONS.items() if said in metadata.values}
    pattern = raw.pop("sliding_window_pattern", None)
    if isinstance(pattern, list):
        kinds = {True: "sliding_attention", False: "full_attention"}
        raw["layer_types"] = [kinds[bool(local)] for local in pattern]
    elif pattern:
        raw["sliding_window_pattern"] = pattern
    return raw


def _rope(metadata: Metadata, header: GgufHeader, head_dim: int) -> Rope:
    defaults, path = FAMILIES[metadata.kind.family].defaults, metadata.path
    theta = float(metadata.number("rope.freq_base", defaults.get("rope_theta", 10000.0)))
    if ROPE_TABLE in header.tensors:
        return _llama3_rope(theta, read_tensor(header.tensors[ROPE_TABLE]), head_dim, path)
    kind = metadata.values.get("rope.scaling.type", "none")
    if kind == "none":
        return Rope(theta=theta)
    if kind == "linear":
        factor = float(metadata.number("rope.scaling.factor"))
        return Rope(theta=theta, kind="linear", factor=factor)
    raise UserError(
        f"{path}: rope scaling {kind!r} is not supported; supported: none, linear, llama3"
    )


def _llama3_rope(theta: float, table: np.ndarray, head_dim: int, path: Path) -> Rope:
    factor = max(round(float(table.max(initial=1)), 4), 1.0)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    length = LLAMA3["original_max_position_embeddings"]
    turns = length / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-4):
        raise UserError(
            f"{path}: {ROPE_TABLE} is not Llama 3.1's rope scaling; give a Hugging Face folder"
        )
    return Rope(
        theta=theta,
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=int(length),
    )
