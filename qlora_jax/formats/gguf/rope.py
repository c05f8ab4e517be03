"""Converts the rope metadata of a .gguf file to the keys of a config.json.

Each scaling of llama.cpp becomes transformers' scaling of the same name. The reader refuses
metadata for which the two compute different values. As in llama.cpp (`load_hparams` in
llama-model.cpp), a file without a type has type linear, and a file without a factor has no scaling.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qlora_jax.formats.gguf.metadata import Metadata
from qlora_jax.formats.gguf.tensors import check_dequantizable, read_tensor
from qlora_jax.models.families import Family
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import GgufTensor

LLAMA3_TABLE = "rope_freqs.weight"
LONGROPE_TABLES = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}
TABLES = {LLAMA3_TABLE, *LONGROPE_TABLES.values()}
"""Names of tensors that are not weights, but divisors of the rope's frequencies."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Rope settings of Llama 3.1 to 3.3. A GGUF file has only the table that is computed from them."""

SCALING = "rope.scaling"
READ = {
    "rope.dimension_count",
    "rope.freq_base",
    f"{SCALING}.type",
    f"{SCALING}.factor",
    "rope.scale_linear",
    f"{SCALING}.original_context_length",
    f"{SCALING}.finetuned",
}
"""Keys that any file may have. `finetuned` tells the origin of the weights; it has no effect."""

OWN = {
    "yarn": {f"{SCALING}.yarn_beta_fast", f"{SCALING}.yarn_beta_slow"},
    "longrope": {f"{SCALING}.attn_factor"},
}
"""Type of scaling to the keys that are read only for this type."""

WITHOUT_EFFECT = {
    f"{SCALING}.attn_factor": 1,
    f"{SCALING}.alpha": 0,
    f"{SCALING}.yarn_ext_factor": 1,
    f"{SCALING}.yarn_log_multiplier": 0,
}
"""Key that is not read, and its only allowed value: with this value, it has no effect."""


def rope_keys(
    metadata: Metadata,
    family: Family,
    tensors: Mapping[str, GgufTensor],
    head_dim: int,
    rotated: int,
) -> dict[str, Any]:
    """Returns the keys of a config.json that describe the rope.

    Args:
      metadata: metadata of the file.
      family: family of the model.
      tensors: tensors of the file, by their names in the file.
      head_dim: number of channels of a head.
      rotated: number of rotated channels of a head.

    Raises:
      UserError: a type of scaling, a table or other metadata of the rope is not supported.
    """
    tables = {
        name: _table(metadata, name, tensors[name], rotated)
        for name in sorted(TABLES & tensors.keys())
    }
    kind = _kind(metadata, tables)
    keys: dict[str, Any] = {}
    if "rope.freq_base" in metadata.values:
        keys["rope_theta"] = float(metadata.number("rope.freq_base"))
    if "partial_rotary_factor" in {*family.keys, *family.defaults}:
        keys["partial_rotary_factor"] = rotated / head_dim
    has_local = "rope_local_base_freq" in family.defaults
    if has_local and "rope.freq_base_swa" in metadata.values:
        keys["rope_local_base_freq"] = float(metadata.number("rope.freq_base_swa"))
    _refuse_unread(metadata, kind, has_local, rotated)
    theta = keys.get("rope_theta", family.defaults.get("rope_theta", 10000.0))
    if LLAMA3_TABLE in tables:
        keys["rope_scaling"] = _llama3(metadata, tables[LLAMA3_TABLE], theta, head_dim)
    else:
        keys["rope_scaling"] = SCALINGS[kind](metadata, tables)
    original = "original_max_position_embeddings"
    scaling = keys["rope_scaling"] or {}
    # Phi-3 reads this key at the top level of config.json, so give it there too.
    return keys | {key: scaling[key] for key in (original,) if key in scaling}


def _table(metadata: Metadata, name: str, tensor: GgufTensor, rotated: int) -> np.ndarray:
    if tensor.shape != (rotated // 2,):
        raise UserError(
            f"{metadata.path}: {name} has shape {tensor.shape}; expected ({rotated // 2},), one "
            "divisor for each pair of rotated dimensions"
        )
    check_dequantizable(name, tensor, metadata.path)
    return read_tensor(tensor)


def _kind(metadata: Metadata, tables: Mapping[str, np.ndarray]) -> str:
    """Returns the type of scaling, a key of `SCALINGS`."""
    long = LONGROPE_TABLES["long_factor"]
    stated = metadata.values.get(f"{SCALING}.type")
    kind = stated or ("longrope" if long in tables else "linear")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(
            f"{metadata.path}: rope scaling {kind!r} is not supported; "
            f"supported: {', '.join(SCALINGS)}, llama3"
        )
    for table in tables:
        scaled = kind == "linear" and _factor(metadata) is not None
        fits = kind == "longrope" if table != LLAMA3_TABLE else kind in ("none", "linear")
        if scaled or not fits:
            raise UserError(
                f"{metadata.path}: rope scaling {kind!r} beside {table} is not supported; give a "
                "Hugging Face folder"
            )
    return kind


def _factor(metadata: Metadata) -> float | None:
    """Returns the scaling factor, from its key or its old key; None for no factor.

    llama.cpp and some files write 0 for no factor.
    """
    key = f"{SCALING}.factor" if f"{SCALING}.factor" in metadata.values else "rope.scale_linear"
    value = metadata.values.get(key, 0)
    return None if value == 0 else float(metadata.number(key))


def _refuse_unread(metadata: Metadata, kind: str, has_local: bool, rotated: int) -> None:
    values = metadata.values
    without_effect = WITHOUT_EFFECT | {
        "rope.freq_base_swa": values.get("rope.freq_base", 10000.0),
        "rope.dimension_count_swa": rotated,
    }
    read = READ | OWN.get(kind, set()) | ({"rope.freq_base_swa"} if has_local else set())
    for key in sorted(values):
        if not key.startswith("rope.") or key in read:
            continue
        if key not in without_effect or values[key] != without_effect[key]:
            raise UserError(
                f"{metadata.path}: metadata {metadata.architecture}.{key} {values[key]!r} is not "
                f"supported with rope scaling {kind!r}; give a Hugging Face folder"
            )


def _none(metadata: Metadata, tables: Mapping[str, np.ndarray]) -> None:
    return None


def _linear(metadata: Metadata, tables: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    factor = _factor(metadata)
    return None if factor is None else {"rope_type": "linear", "factor": factor}


def _yarn(metadata: Metadata, tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the settings of YaRN.

    The ramp and the attention factor of llama.cpp equal transformers' defaults.
    """
    factor = _factor(metadata)
    return {
        "rope_type": "yarn",
        "factor": metadata.number(f"{SCALING}.factor") if factor is None else factor,
        "original_max_position_embeddings": _original(metadata),
        "beta_fast": metadata.number(f"{SCALING}.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(f"{SCALING}.yarn_beta_slow", 1.0),
    }


def _longrope(metadata: Metadata, tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if _factor(metadata) not in (None, 1.0):
        raise UserError(
            f"{metadata.path}: rope scaling 'longrope' with a factor is not supported; give a "
            "Hugging Face folder"
        )
    for table in LONGROPE_TABLES.values():
        if table not in tables:
            raise UserError(
                f"{metadata.path}: rope scaling 'longrope' without {table} is not supported; give "
                "a Hugging Face folder"
            )
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": _original(metadata),
        "attention_factor": float(metadata.number(f"{SCALING}.attn_factor", 1.0)),
        **{key: tables[name].astype(float).tolist() for key, name in LONGROPE_TABLES.items()},
    }


SCALINGS: Mapping[str, Callable[..., dict[str, Any] | None]] = {
    "none": _none,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Type of scaling to the function of (metadata, tables) that returns `rope_scaling`."""


def _original(metadata: Metadata) -> Any:
    key = f"{SCALING}.original_context_length"
    return metadata.number(key, metadata.values.get("context_length"))


def _llama3(metadata: Metadata, table: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    factor = max(round(float(table.max(initial=1)), 4), 1.0)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    length = LLAMA3["original_max_position_embeddings"]
    turns = length / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-4):
        raise UserError(
            f"{metadata.path}: {LLAMA3_TABLE} is not Llama 3.1's rope scaling; give a Hugging "
            "Face folder"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
