"""Reads a Hugging Face folder: config.json beside safetensors weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax import paths
from qlora_jax.errors import UserError
from qlora_jax.formats.names import check_shapes
from qlora_jax.models.config import DecoderConfig, from_hugging_face

FLOATS = ("F32", "F16", "BF16")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A `Checkpoint` in a Hugging Face folder. `files` says which file holds which tensor."""

    path: Path
    config: DecoderConfig
    description: str
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @property
    def tokenizer_path(self) -> Path:
        return self.path

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        # A memory map's pages count as resident until it is closed: pread holds the tensor alone.
        with safe_open(self.files[name], framework="numpy", backend="pread") as file:
            return file.get_tensor(name)


def open_folder(folder: Path) -> HuggingFaceCheckpoint:
    """Opens a folder with config.json and safetensors weights, in one file or in shards.

    Raises:
      UserError: a file is missing or damaged, the weights are of another format or quantized, or
        they do not agree with config.json.
    """
    config = _config(folder)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in _weight_files(folder):
        for name, (shape, dtype) in _header(path).items():
            files[name], shapes[name], dtypes[name] = path, shape, dtype
    expected = check_shapes(shapes, config, folder)
    if other := [name for name in expected if dtypes[name] not in FLOATS]:
        raise UserError(
            f"{files[other[0]]}: {other[0]} is stored as {dtypes[other[0]]}; "
            f"supported: {', '.join(FLOATS)}. Give the 16-bit checkpoint"
        )
    kinds = sorted({dtypes[name] for name, shape in expected.items() if len(shape) == 2})
    return HuggingFaceCheckpoint(
        path=folder,
        config=config,
        description=f"safetensors {'/'.join(kinds)}",
        files={name: files[name] for name in expected},
        shapes=expected,
    )


def _config(folder: Path) -> DecoderConfig:
    path = folder / CONFIG
    if not paths.is_file(path):
        if paths.is_file(folder / "adapter_config.json"):
            raise UserError(
                f"{folder}: an adapter and not a model; give the model it was trained on"
            )
        raise UserError(f"{folder}: no config.json in it; give a Hugging Face model folder")
    raw = _json(path)
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        raise UserError(
            f"{path}: quantization_config ({method}): checkpoints that are already quantized are "
            "not supported; give the 16-bit checkpoint"
        )
    return from_hugging_face(raw, str(path))


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS, folder / INDEX
    if paths.is_file(single):
        return [single]
    if paths.is_file(index):
        names = _json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise UserError(f"{index}: no weight_map in it; download it again")
        shards = [folder / name for name in sorted(set(names.values()))]
        if absent := [shard.name for shard in shards if not paths.is_file(shard)]:
            raise UserError(
                f"{folder}: {absent[0]} is missing, {len(absent)} of {len(shards)} shards are; "
                "download them"
            )
        return shards
    if other := sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]):
        raise UserError(
            f"{folder}: the weights are PyTorch pickles ({other[0].name}); convert them to "
            f"{WEIGHTS} with save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{folder}: no {WEIGHTS} in it; download the weights")


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or damaged ({e}); download it again") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return raw
