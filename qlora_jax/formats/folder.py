"""Writes a Hugging Face model folder, completely or not at all, with one shard in memory."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors asks for by name)
import numpy as np

from qlora_jax.formats import tensors as tensors_
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.config_json import to_hugging_face
from qlora_jax.formats.huggingface import CONFIG
from qlora_jax.formats.shards import INDEX, WEIGHTS
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.atomic import atomic_folder
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.tokenizer import FILES, Tokenizer, load_tokenizer

SHARD_BYTES = 5 * 10**9
GENERATION = "generation_config.json"


def check_new(folder: Path) -> None:
    """Raises UserError if the folder exists and is not empty."""
    if paths.exists(folder) and not (paths.is_dir(folder) and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give a new or an empty folder")


def write_folder(
    folder: Path,
    source: Checkpoint,
    changes: Mapping[str, Any],
    dtype: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    tokenizer: Tokenizer | None = None,
    replace: bool = False,
    add: Callable[[Path], None] = lambda folder: None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes a model folder that transformers can load, with the tokenizer of the source model.

    Args:
      folder: folder to write; it must be absent or empty unless `replace` is set.
      source: checkpoint that gives config.json, tokenizer and generation config.
      changes: keys of config.json to add or change.
      dtype: dtype to write into config.json.
      tensors: parameter names and values, taken one at a time.
      tokenizer: tokenizer to write; None: the source's tokenizer. That of a GGUF file is converted.
      replace: whether to replace an existing model folder.
      add: function that writes more files into the folder before it gets its final name.
      shard_bytes: largest number of bytes of weights in one file; a larger tensor gets a separate
        file.

    Returns:
      Number of bytes of the weights.

    Raises:
      UserError: the folder is in use, or the disk is full or not writable.
    """
    if not replace:
        check_new(folder)
    with atomic_folder(folder) as new:
        total = _write_weights(new, tensors, shard_bytes)
        if tokenizer is None and not source.path.is_dir():
            tokenizer = load_tokenizer(source.tokenizer_path).for_embedding(
                source.config.vocab_size
            )
        _write_json(new / CONFIG, _config(source, tokenizer, dtype) | dict(changes))
        _write_tokenizer(source, tokenizer, new)
        add(new)
    return total


def _config(source: Checkpoint, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    if tokenizer is None:
        raw = json_files.read_object(source.path / CONFIG, "download it again")
        raw.pop("quantization_config", None)
    else:
        raw = to_hugging_face(source.config)
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        raw |= {f"{name}_token_id": value for name, value in ids.items()}
    raw["tie_word_embeddings"] = source.config.tie_embeddings
    old = "torch_dtype" in raw and "dtype" not in raw  # transformers 4 writes torch_dtype
    return raw | {"torch_dtype" if old else "dtype": dtype}


def _write_tokenizer(source: Checkpoint, tokenizer: Tokenizer | None, folder: Path) -> None:
    if tokenizer is None:
        for pattern in FILES:
            for file in source.path.glob(pattern):
                if file.name != CONFIG:
                    _copy(file, folder / file.name)
        return
    tokenizer.save(folder)
    ends = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    _write_json(folder / GENERATION, ends)


def _copy(file: Path, to: Path) -> None:
    if file.is_dir():
        shutil.copytree(file, to)
    else:
        shutil.copyfile(file, to)


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> int:
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = size = 0

    def save() -> None:
        tensors_.save(waiting, folder / _shard(len(shards)))
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > shard_bytes:
            save()
            size = 0
        # save_file writes the memory in its order, so a transposed view would be written wrongly.
        waiting[name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
        total += tensor.nbytes
    save()
    if len(shards) == 1:
        os.replace(folder / _shard(0), folder / WEIGHTS)
        return total
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / _shard(i), folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _shard(index: int) -> str:
    return f"shard-{index}.safetensors"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
