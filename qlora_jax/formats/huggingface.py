"""Reads a Hugging Face folder: config.json beside safetensors weights."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open

from qlora_jax.formats import bitsandbytes, contents, tying
from qlora_jax.formats.names import by_decoder_name, check_shapes, is_ignored
from qlora_jax.formats.shards import StoredTensor, find_tensors
from qlora_jax.models.config import DecoderConfig, from_hugging_face
from qlora_jax.quant import QTensor
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError

FLOATS = ("F32", "F16", "BF16")
ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
"""dtype in which bitsandbytes can store packed codes, to its bytes per element."""
CONFIG = "config.json"
BNB_4BIT = "bitsandbytes in 4 bits"


@dataclasses.dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A `Checkpoint` in a Hugging Face folder.

    Attributes:
      path: the folder.
      config: shapes and switches of the decoder.
      description: storage format of the weights, in words.
      stored: decoder's name to tensor in a file, including the further tensors of bitsandbytes.
      shapes: name of a decoder's parameter to its shape.
      quantization: the 4-bit weights; None if all weights are floats.
      notes: lines for the user about statements of config.json that the reader does not follow.
    """

    path: Path
    config: DecoderConfig
    description: str
    stored: dict[str, StoredTensor]
    shapes: dict[str, tuple[int, ...]]
    quantization: bitsandbytes.Quantization | None
    notes: tuple[str, ...] = ()

    @property
    def tokenizer_path(self) -> Path:
        return self.path

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray | jax.Array | QTensor:
        layout = self.quantization.layouts.get(name) if self.quantization else None
        if layout is None:
            return self.stored[name].read()
        names = {p: f"{name}.{p}" for p in bitsandbytes.PARTS}
        parts = {p: self.stored[n].read() for p, n in names.items() if n in self.stored}
        state = self.stored[f"{name}.quant_state.bitsandbytes__{layout.kind}"].read().tobytes()
        return bitsandbytes.read_weight(name, layout, self.stored[name].read(), parts, state)


def open_folder(folder: Path) -> HuggingFaceCheckpoint:
    """Opens a folder with config.json and safetensors weights, in one file or in shards.

    The linears of the layers may be stored in bitsandbytes' 4 bits. The tensors, not config.json,
    decide the format of the weights and whether head and embedding are tied. If config.json says
    something else, `notes` has a line about it.

    Raises:
      UserError: a file is missing or damaged, the weights have another format or quantization, or
        they do not agree with config.json.
    """
    raw = _config(folder)
    config = from_hugging_face(raw, str(folder / CONFIG))
    stored = by_decoder_name(find_tensors(folder), config.names)
    layouts = _layouts(stored)
    settings = raw.get("quantization_config")
    if settings is not None and not layouts:
        _check_floats(settings, stored, config, folder)
    tie = _tie(config, stored)
    config = tie.config
    embed = tying.matrices(config)[0]
    if tie.stored != embed:
        stored[embed] = stored.pop(tie.stored)
    if embed in layouts:
        raise UserError(
            f"{folder}: {embed} is in 4 bits, which is not supported; give the 16-bit model"
        )
    expected = check_shapes(_shapes(stored, layouts), config, folder)
    plain = [name for name in expected if name not in layouts]
    if other := [name for name in plain if stored[name].dtype not in FLOATS]:
        raise UserError(
            f"{stored[other[0]].file}: {other[0]} is stored as {stored[other[0]].dtype}; "
            f"supported: {', '.join(FLOATS)}. Give the 16-bit checkpoint"
        )
    kinds = sorted({stored[name].dtype for name in plain if len(expected[name]) == 2})
    kinds += sorted({f"bitsandbytes {layout.kind}" for layout in layouts.values()})
    notes = [f"{folder / CONFIG}: {tie.note}"] if tie.note else []
    if settings is not None and _method(settings) != (BNB_4BIT if layouts else None):
        weights = "in bitsandbytes' 4 bits" if layouts else "floats"
        notes.append(
            f"{folder / CONFIG}: quantization_config ({_method(settings)}) is ignored: the weights "
            f"are {weights}"
        )
    return HuggingFaceCheckpoint(
        path=folder,
        config=config,
        description=f"safetensors {'/'.join(kinds)}",
        stored=stored,
        shapes=expected,
        quantization=bitsandbytes.quantization(layouts),
        notes=tuple(notes),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not paths.is_file(path):
        raise contents.not_a_model(folder, CONFIG)
    return json_files.read_object(path, "download it again")


def _tie(config: DecoderConfig, stored: Mapping[str, StoredTensor]) -> tying.Tie:
    def equal() -> bool:
        embed, head = (stored[name] for name in tying.matrices(config))
        floats = embed.dtype in FLOATS and head.dtype in FLOATS
        alike = floats and embed.shape == head.shape and len(embed.shape) == 2
        return alike and tying.equal_rows(embed.shape[0], embed.rows, head.rows)

    return tying.resolve_tying(config, stored, equal)


def _shapes(
    stored: Mapping[str, StoredTensor], layouts: Mapping[str, bitsandbytes.StoredLayout]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights, without the further tensors of 4-bit weights."""
    shapes = {
        name: tensor.shape
        for name, tensor in stored.items()
        if name.rpartition(".")[0] not in layouts and not bitsandbytes.STATE.fullmatch(name)
    }
    return shapes | {name: layout.shape for name, layout in layouts.items()}


def _layouts(stored: Mapping[str, StoredTensor]) -> dict[str, bitsandbytes.StoredLayout]:
    """Returns the storage format of every 4-bit weight, and checks the weight's further tensors."""
    by_file: dict[Path, list[tuple[StoredTensor, str, str]]] = defaultdict(list)
    for name, tensor in stored.items():
        if found := bitsandbytes.STATE.fullmatch(name):
            by_file[tensor.file].append((tensor, found[1], found[2]))
    layouts = {}
    for path, states in by_file.items():
        with safe_open(path, framework="numpy", backend="pread") as file:
            for state, weight, kind in states:
                where, table = f"{path}: {weight}", stored.get(f"{weight}.nested_quant_map")
                values = None
                if table is not None:
                    values = file.get_tensor(table.name) if table.file == path else table.read()
                text = file.get_tensor(state.name).tobytes()
                layout = bitsandbytes.read_layout(where, kind, text, values)
                parts = {"weight": weight} | {p: f"{weight}.{p}" for p in bitsandbytes.PARTS}
                found_parts = {part: _part(stored[n]) for part, n in parts.items() if n in stored}
                bitsandbytes.check_parts(where, layout, found_parts)
                layouts[weight] = layout
    return layouts


def _part(tensor: StoredTensor) -> tuple[tuple[int, ...], str, int]:
    """Returns shape, dtype and number of bytes."""
    size = math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0)
    return tensor.shape, tensor.dtype, size


def _check_floats(
    settings: Any, stored: Mapping[str, StoredTensor], config: DecoderConfig, folder: Path
) -> None:
    """Raises UserError if a weight is not a float. The caller found no 4-bit weight."""
    weights = (t for name, t in stored.items() if not is_ignored(name, config))
    if any(tensor.dtype not in FLOATS for tensor in weights):
        raise UserError(
            f"{folder / CONFIG}: quantization_config ({_method(settings)}): this quantization is "
            "not supported; give a checkpoint in bitsandbytes' 4 bits or the 16-bit checkpoint"
        )


def _method(settings: Any) -> str:
    """Returns the name of the quantization; a config of bitsandbytes may have no quant_method."""
    given = settings if isinstance(settings, dict) else {}
    eight = given.get("load_in_8bit") or given.get("_load_in_8bit")
    four = given.get("load_in_4bit") or given.get("_load_in_4bit")
    method = given.get("quant_method", "bitsandbytes" if eight or four else "?")
    if method != "bitsandbytes":
        return str(method)
    return "bitsandbytes in 8 bits" if eight else BNB_4BIT
