"""Writes a Hugging Face folder, one tensor in memory at a time."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qlora_jax import paths
from qlora_jax.atomic import storage_error
from qlora_jax.errors import UserError
from qlora_jax.formats.huggingface import CONFIG, INDEX, WEIGHTS
from qlora_jax.models.config import DecoderConfig, Rope

DTYPES: Mapping[np.dtype, str] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
"""safetensors' names."""
SHARD_BYTES = 5 * 10**9
"""Most bytes of weights in one file, as transformers has it; a larger tensor has its own."""
ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: np.typing.DTypeLike,
    save_tokenizer: Callable[[Path], object] = lambda folder: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, weights and tokenizer; a model folder that is there is replaced.

    The folder appears whole or not at all.

    Args:
      folder: where; its parents are made.
      config: becomes config.json, with `dtype` added.
      shapes: every tensor's name and shape, in the order of the file; linears are [out, in].
      read: name to values, called once for each.
      dtype: float32, float16 or bfloat16, to which values are rounded.
      save_tokenizer: called with a folder to put the tokenizer's files into.
      shard_bytes: of weights in one file, at most.

    Raises:
      UserError: the folder holds something else than a model, or the disk is full.
    """
    check_replaceable(folder)
    dtype = np.dtype(dtype)
    shards = _shards(shapes, dtype.itemsize, shard_bytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            new, old = Path(work, "new"), Path(work, "old")
            new.mkdir()
            save_tokenizer(new)
            for file, names in shards.items():
                with (new / file).open("wb") as f:
                    _write_safetensors(f, {n: shapes[n] for n in names}, read, dtype)
            if len(shards) > 1:
                _write_json(new / INDEX, _index(shards, shapes, dtype.itemsize))
            _write_json(new / CONFIG, dict(config) | {"dtype": dtype.name})
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except BaseException:
                if old.exists():
                    os.replace(old, folder)
                raise
    except OSError as e:
        problem = storage_error(folder.parent, e)
        if problem is None:
            raise
        raise problem from None


def check_replaceable(folder: Path) -> None:
    """Raises UserError where something else than a model folder is in the way."""
    if not paths.exists(folder):
        return
    if not paths.is_dir(folder):
        raise UserError(f"{folder}: a file is in the way; give another folder")
    if any(folder.iterdir()) and not paths.is_file(folder / CONFIG):
        raise UserError(f"{folder}: exists and is no model's; give an empty or a new folder")


def config_json(
    config: DecoderConfig, *, eos_id: int | list[int], bos_id: int | None, pad_id: int | None
) -> dict[str, Any]:
    """What config.json says of a decoder, as transformers 4 and 5 read it.

    Args:
      config: shapes and switches.
      eos_id: one id, or all that end generation.
      bos_id: begin-of-text id, if there is one.
      pad_id: of padding.
    """
    windowed = any(config.windows)
    window = next((w for w in config.windows if w), None)
    entries: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": (config.rope or Rope()).theta,
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": window,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if config.family == "qwen2":
        kinds = ["sliding_attention" if w else "full_attention" for w in config.windows]
        entries |= {"use_sliding_window": windowed, "layer_types": kinds}
    return entries


def _rope_scaling(config: DecoderConfig) -> dict[str, Any] | None:
    rope = config.rope or Rope()
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    return scaling


def _shards(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, most: int
) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        own = itemsize * int(np.prod(shape))
        if groups[-1] and size + own > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def _index(
    shards: Mapping[str, Iterable[str]], shapes: Mapping[str, tuple[int, ...]], itemsize: int
) -> dict[str, Any]:
    total = sum(itemsize * int(np.prod(shape)) for shape in shapes.values())
    names = {name: file for file, names in shards.items() for name in names}
    return {"metadata": {"total_size": total}, "weight_map": names}


def _write_safetensors(
    file: BinaryIO,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype,
) -> None:
    """The format's own layout: the header's length, the header, the tensors one after the other.

    safetensors' own writer takes all arrays at once.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for name, shape in shapes.items():
        array = np.asarray(read(name))
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape} and not {shape}")
        # a view of bytes: bfloat16 has no buffer format
        file.write(array.astype(dtype, order="C").reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
