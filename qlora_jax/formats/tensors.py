"""Tensors in safetensors files that this project writes carry digests, which reading compares."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qlora_jax.runtime import digests, json_files
from qlora_jax.runtime.errors import UserError

KEY = "qlora_jax.sha256"
"""The key in a file's metadata that holds the digests: a JSON object of names to digests."""


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes tensors with their digests; equal tensors give equal bytes."""
    save_file(tensors, path, metadata=metadata(tensors))
    # safetensors writes the keys of the metadata in a random order
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json_files.parse(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def metadata(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the metadata of a file of tensors: PyTorch's format, and the digests."""
    found = {name: digests.digest(tensor) for name, tensor in tensors.items()}
    return {"format": "pt", KEY: json.dumps(found)}


def read(file: Any, name: str, path: Path) -> np.ndarray:
    """Reads a tensor and compares its digest where the file has one.

    Args:
      file: of `safetensors.safe_open`, for numpy.
      name: of the tensor.
      path: of the file, for messages.

    Raises:
      UserError: the tensor is not the one that was saved.
    """
    tensor: np.ndarray = file.get_tensor(name)
    expected = _digests(file, path).get(name)
    if expected is not None and expected != digests.digest(tensor):
        raise UserError(
            f"{path}: {name} differs from what was saved, by the digest in the file; "
            "copy or export it again"
        )
    return tensor


def _digests(file: Any, path: Path) -> Mapping[str, Any]:
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        return {}
    try:
        found = json_files.parse(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: {KEY} in its metadata is no JSON object; export it again")
    return found
