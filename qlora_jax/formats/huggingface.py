"""Reads a Hugging Face folder: config.json beside safetensors weights."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.formats import bitsandbytes, tensors
from qlora_jax.formats.names import check_shapes
from qlora_jax.models.config import DecoderConfig, from_hugging_face
from qlora_jax.quant import QTensor
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError

FLOATS = ("F32", "F16", "BF16")
ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
"""Of the dtypes in which bitsandbytes lets packed codes lie."""
EMBEDDING = "model.embed_tokens.weight"
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
    quantization: bitsandbytes.Quantization | None

    @property
    def tokenizer_path(self) -> Path:
        return self.path

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray | jax.Array | QTensor:
        stored = self.quantization.layouts.get(name) if self.quantization else None
        if stored is None:
            return _tensor(self.files[name], name)
        names = {p: f"{name}.{p}" for p in bitsandbytes.PARTS}
        parts = {p: _tensor(self.files[n], n) for p, n in names.items() if n in self.files}
        state = f"{name}.quant_state.bitsandbytes__{stored.kind}"
        return bitsandbytes.decode(
            name,
            stored,
            _tensor(self.files[name], name),
            parts,
            _tensor(self.files[state], state).tobytes(),
        )


def _tensor(path: Path, name: str) -> np.ndarray:
    # A memory map's pages count as resident until it is closed: pread holds the tensor alone.
    with safe_open(path, framework="numpy", backend="pread") as file:
        return tensors.read(file, name, path)


def open_folder(folder: Path) -> HuggingFaceCheckpoint:
    """Opens a folder with config.json and safetensors weights, in one file or in shards.

    Layers' linears may be stored in bitsandbytes' 4 bits.

    Raises:
      UserError: a file is missing or damaged, the weights are of another format or quantized in
        another way, or they do not agree with config.json.
    """
    config = _config(folder)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    places = _places(folder)
    for path in _weight_files(folder, places):
        for name, (shape, dtype) in _header(path).items():
            place = places.get(name) or files.get(name, path).name
            if place != path.name:
                raise UserError(
                    f"{path}: holds {name}, which belongs in {place}; download both again"
                )
            files[name], shapes[name], dtypes[name] = path, shape, dtype
    if absent := sorted(set(places or ()) - set(files)):
        raise UserError(
            f"{folder / INDEX}: places {absent[0]} in {places[absent[0]]}, which does not hold it; "
            "download both again"
        )
    layouts = _layouts(files, shapes, dtypes)
    if EMBEDDING in layouts:
        raise UserError(f"{folder}: {EMBEDDING} is in 4 bits, which is not supported")
    quantization = bitsandbytes.quantization(layouts)
    weights = {n: s for n, s in shapes.items() if n.rpartition(".")[0] not in layouts}
    weights = {n: s for n, s in weights.items() if not bitsandbytes.STATE.fullmatch(n)}
    expected = check_shapes(weights | {n: x.shape for n, x in layouts.items()}, config, folder)
    plain = [name for name in expected if name not in layouts]
    if other := [name for name in plain if dtypes[name] not in FLOATS]:
        raise UserError(
            f"{files[other[0]]}: {other[0]} is stored as {dtypes[other[0]]}; "
            f"supported: {', '.join(FLOATS)}. Give the 16-bit checkpoint"
        )
    kinds = sorted({dtypes[name] for name in plain if len(expected[name]) == 2})
    kinds += sorted({f"bitsandbytes {layout.kind}" for layout in layouts.values()})
    return HuggingFaceCheckpoint(
        path=folder,
        config=config,
        description=f"safetensors {'/'.join(kinds)}",
        files=files,
        shapes=expected,
        quantization=quantization,
    )


def _layouts(
    files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> dict[str, bitsandbytes.Layout]:
    """Every weight that is stored in 4 bits; the tensors beside it have been checked."""
    by_file: dict[Path, list[tuple[str, str, str]]] = defaultdict(list)
    for name in files:
        if found := bitsandbytes.STATE.fullmatch(name):
            by_file[files[name]].append((name, found[1], found[2]))
    layouts = {}
    for path, states in by_file.items():
        with safe_open(path, framework="numpy", backend="pread") as file:
            for state, weight, kind in states:
                where, nested = f"{path}: {weight}", f"{weight}.nested_quant_map"
                here = files.get(nested) == path
                table = file.get_tensor(nested) if here else None
                if nested in files and not here:
                    table = _tensor(files[nested], nested)
                text = file.get_tensor(state).tobytes()
                layout = bitsandbytes.read_layout(where, kind, text, table)
                parts = {"weight": weight} | {p: f"{weight}.{p}" for p in bitsandbytes.PARTS}
                found_parts = {
                    part: (
                        shapes[n],
                        dtypes[n],
                        math.prod(shapes[n]) * ITEM_BYTES.get(dtypes[n], 0),
                    )
                    for part, n in parts.items()
                    if n in files
                }
                bitsandbytes.check_parts(where, layout, found_parts)
                layouts[weight] = layout
    return layouts


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
        _check_quantization(quantized, path)
    return from_hugging_face(raw, str(path))


def _check_quantization(quantized: Any, path: Path) -> None:
    settings = quantized if isinstance(quantized, dict) else {}
    method = settings.get("quant_method", "?")
    eight = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
    if method == "bitsandbytes" and not eight:
        return
    what = f"{method} in 8 bits" if method == "bitsandbytes" else method
    raise UserError(
        f"{path}: quantization_config ({what}): of checkpoints that are already quantized only "
        "bitsandbytes' in 4 bits are supported; give that or the 16-bit checkpoint"
    )


def _places(folder: Path) -> dict[str, str]:
    """Returns each tensor's shard by the index; nothing where the weights are in one file."""
    index = folder / INDEX
    if paths.is_file(folder / WEIGHTS) or not paths.is_file(index):
        return {}
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise UserError(f"{index}: no weight_map in it; download it again")
    for file in places.values():
        if Path(file).name != file:
            raise UserError(f"{index}: {file!r} is no name of a file in the folder")
    return places


def _weight_files(folder: Path, places: Mapping[str, str]) -> list[Path]:
    single = folder / WEIGHTS
    if paths.is_file(single):
        return [single]
    if places:
        shards = [folder / name for name in sorted(set(places.values()))]
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
    return json_files.read_object(path, "download it again")
