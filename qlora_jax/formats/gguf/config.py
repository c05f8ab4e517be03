"""Converts the metadata of a .gguf file to the config of a decoder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.formats.gguf.metadata import Metadata
from qlora_jax.formats.gguf.rope import rope_keys
from qlora_jax.models.config import DecoderConfig, from_hugging_face
from qlora_jax.models.families import FAMILIES, Family
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import GgufHeader, GgufTensor

OPTIONS = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
}
"""Metadata key to key of config.json. A family reads only the keys that it has."""


def config_of(header: GgufHeader, found: Mapping[str, GgufTensor], path: Path) -> DecoderConfig:
    """Returns the config of the model in a file.

    Args:
      header: header of the file; its architecture is one of `ARCHITECTURES`.
      found: Hugging Face name to tensor, for all weights.
      path: path of the file, for messages.

    Raises:
      UserError: metadata is missing, malformed or not supported.
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
    raw |= rope_keys(metadata, family, header.tensors, head_dim, rotated)
    config = from_hugging_face({family.keys.get(k, k): v for k, v in raw.items()}, str(path))
    if metadata.window and family.windows not in ("all", "patterned"):
        raise UserError(
            f"{path}: metadata {architecture}.attention.sliding_window is {metadata.window}; "
            f"sliding windows of architecture {architecture} are not supported"
        )
    names = family.names
    first = f"{names.layers}.0"
    qkv = names.qkv_proj if config.fused_qkv else names.q_proj
    return dataclasses.replace(
        config,
        qkv_bias=f"{first}.{qkv}.bias" in found,
        output_bias=f"{first}.{names.o_proj}.bias" in found,
        mlp_bias=f"{first}.{names.down_proj}.bias" in found,
    )


def _head_sizes(metadata: Metadata, family: Family) -> tuple[int, int]:
    """Returns the number of channels of a head, and the number of rotated channels."""
    number = metadata.number
    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    rotated = number("rope.dimension_count", head_dim)
    partial = "partial_rotary_factor" in {*family.keys, *family.defaults}
    if rotated != head_dim and not partial:
        raise UserError(
            f"{metadata.path}: {rotated} of {head_dim} dimensions per head are rotated; "
            f"architecture {metadata.architecture} is supported only with all of them rotated"
        )
    return head_dim, rotated


def _keys(
    metadata: Metadata, family: Family, found: Mapping[str, GgufTensor], head_dim: int
) -> dict[str, Any]:
    """Returns the metadata under the keys of a config.json."""
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
        "query_pre_attn_scalar": query,
    } | {key: metadata.values[said] for said, key in OPTIONS.items() if said in metadata.values}
    pattern = raw.pop("sliding_window_pattern", None)
    if isinstance(pattern, list):
        kinds = {True: "sliding_attention", False: "full_attention"}
        raw["layer_types"] = [kinds[bool(local)] for local in pattern]
    elif pattern:
        raw["sliding_window_pattern"] = pattern
    return raw
