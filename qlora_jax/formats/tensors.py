"""Writes safetensors files with a digest of each tensor, and checks the digests when it reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qlora_jax.runtime import digests, json_files
from qlora_jax.runtime.errors import UserError

KEY = "qlora_jax.sha256"
"""Key in the metadata of a file. Its value is a JSON object: tensor name to digest."""


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file of tensors with their digests. Equal tensors give files with equal bytes."""
    save_file(tensors, path, metadata=metadata(tensors))
    # safetensors writes the metadata keys in a random order, so sort them in the written file.
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json_files.parse(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def metadata(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the metadata of a file of tensors: format "pt" (PyTorch), and the digests."""
    found = {name: digests.digest(tensor) for name, tensor in tensors.items()}
    return {"format": "pt", KEY: json.dumps(found)}


def read(file: Any, name: str, path: Path) -> np.ndarray:
    """Reads a tensor and checks its digest, if the file has one.

    Args:
      file: file that `safetensors.safe_open` opened for numpy.
      name: name of the tensor.
      path: path of the file, for messages.

    Raises:
      UserError: the digest of the tensor differs from the digest in the file.
    """
    tensor: np.ndarray = file.get_tensor(name)
    expected = _digests(file, path).get(name)
    if expected is not None and expected != digests.digest(tensor):
        raise UserError(
            f"{path}: {name} differs from what was saved: its digest does not match; "
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
        raise UserError(f"{path}: {KEY} in its metadata is not a JSON object; export it again")
    return found
