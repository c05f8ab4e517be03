"""Reads an adapter folder into arrays. A tensor that is missing or not expected is an error."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.formats import contents, tensors
from qlora_jax.formats.peft.adapter import (
    CONFIG,
    MATRICES,
    PREFIX,
    WEIGHTS,
    AdapterSet,
    Replaced,
    is_within,
    listed,
    tensor_keys,
)
from qlora_jax.formats.peft.config import by_pattern, read_config, targets_of
from qlora_jax.lora.spec import NEW_NAMES, SCALINGS, Scaling
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.models.families import EMBEDDINGS, HEAD
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

PART = re.compile(
    re.escape(PREFIX) + r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB])|(magnitude)_vector)"
)
BIAS = re.compile(re.escape(PREFIX) + r"(.+?)(?:\.base_layer)?\.bias")


def read_adapter(folder: Path) -> AdapterSet:
    """Reads a LoRA or DoRA adapter in PEFT's format, in the stored dtypes.

    Raises:
      UserError: a file is missing or damaged; a tensor is missing, unexpected, not finite or has
        another shape than in the config; or the config needs something other than LoRA or DoRA.
    """
    config = read_config(folder / CONFIG)
    parts, replaced = _sorted(_plain_keys(_read_tensors(folder / WEIGHTS), folder), config, folder)
    missing = _missing(config, parts)
    if missing or not parts:
        raise UserError(
            f"{folder / WEIGHTS}: missing: {listed(missing) or 'every tensor'}; "
            "export the adapter again"
        )
    scaling: Scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    adapters = {
        path: _weights(path, found, config, scaling, folder) for path, found in parts.items()
    }
    return AdapterSet(
        {NEW_NAMES.get(path, path): adapter for path, adapter in adapters.items()},
        scaling,
        base_name=config.get("base_model_name_or_path") or "",
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=targets_of(config),
        replaced=Replaced(
            replaced,
            tuple(config.get("modules_to_save") or ()),
            config.get("bias", "none"),
            bool(config.get("ensure_weight_tying")),
        ),
    )


def _sorted(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], folder: Path
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Sorts the tensors into the parts of each module's adapter and the parameters of the base.

    Raises:
      UserError: a tensor is neither of the two, or its kind of adapter is not supported.
    """
    saved = tuple(config.get("modules_to_save") or ())
    bias, dora = config.get("bias", "none"), bool(config.get("use_dora"))
    parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    replaced, unexpected = {}, []
    for key, tensor in tensors.items():
        match = PART.fullmatch(key)
        if match and key in tensor_keys(match[1], dora).values():
            parts[match[1]][next(part for part in match.groups()[1:] if part)] = tensor
        elif (name := _whole(key, saved)) or (name := _matrix(key)):
            replaced[name] = tensor
        elif bias != "none" and (match := BIAS.fullmatch(key)):
            replaced[f"{match[1]}.bias"] = tensor
        else:
            unexpected.append(key)
    outer = [path for path in parts if dora and (path in EMBEDDINGS or path == HEAD)]
    if outer:
        raise UserError(
            f"{folder / CONFIG}: use_dora with an adapter of {outer[0]} is not supported; leave it "
            "out of target_modules, or merge the adapter with PEFT"
        )
    # a module that is in the file under its old name and its new name
    unexpected += [path for path, new in NEW_NAMES.items() if {path, new} <= parts.keys()]
    if unexpected:
        raise UserError(
            f"{folder / WEIGHTS}: unexpected tensors: {listed(unexpected)}; "
            "export the adapter again"
        )
    return parts, replaced


def sha256(folder: Path) -> str:
    """Returns SHA-256 of the adapter's weight file, as hex."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain_keys(tensors: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors, each once: PEFT saves some of them twice.

    If a module was trained whole, `bias` all and `save_embedding_layers` save two more modules
    under PEFT's names in memory: the base's original module (dropped here) and a copy of the
    trained module (renamed and compared here).

    Raises:
      UserError: the two copies of a trained tensor differ.
    """
    found: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        if ".original_module." in key:
            continue
        plain = key.replace(".modules_to_save.", ".")
        if not np.array_equal(found.setdefault(plain, tensor), tensor):
            raise UserError(
                f"{folder / WEIGHTS}: {plain} is there twice, with different values; "
                "export the adapter again"
            )
    return found


def _matrix(key: str) -> str | None:
    """Returns the parameter's name if it is the matrix of an embedding or a head, else None.

    PEFT saves these matrices (`save_embedding_layers`) if the adapter targets one of them or if the
    vocabulary was resized.
    """
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    return name if name in MATRICES else None


def _whole(key: str, saved: tuple[str, ...]) -> str | None:
    """Returns the parameter's name in the base if `saved` names its module, else None."""
    name = key.removeprefix(PREFIX)
    return name if key.startswith(PREFIX) and any(is_within(name, s) for s in saved) else None


def _missing(config: Mapping[str, Any], parts: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Returns the names of the tensors that are missing in the file."""
    return [
        key
        for path, found in parts.items()
        for part, key in tensor_keys(path, bool(config.get("use_dora"))).items()
        if part not in found
    ]


def _weights(
    path: str,
    found: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    scaling: Scaling,
    folder: Path,
) -> LoraWeights:
    a, b, magnitude = found["A"], found["B"], found.get("magnitude")
    where = f"{folder / CONFIG}: rank_pattern"
    rank = by_pattern(config.get("rank_pattern"), path, config["r"], where)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(
            f"{folder / WEIGHTS}: {path} has A {list(a.shape)} and B {list(b.shape)}, but "
            f"{CONFIG} says rank {rank}; export the adapter again"
        )
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise UserError(
            f"{folder / WEIGHTS}: {path} has a magnitude {list(magnitude.shape)} for "
            f"{b.shape[0]} outputs; export the adapter again"
        )
    where = f"{folder / CONFIG}: alpha_pattern"
    alpha = by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"], where)
    a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    return LoraWeights(a, b, alpha, SCALINGS[scaling](alpha, rank), magnitude)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not paths.is_file(path):
        pickled = path.with_suffix(".bin")
        if paths.is_file(pickled):
            raise UserError(
                f"{pickled}: a PyTorch pickle, which can hold code and is never read; save the "
                f"adapter as {path.name}: save_pretrained(..., safe_serialization=True)"
            )
        raise contents.not_an_adapter(path.parent, path.name)
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:
            return {key: _finite(tensors.read(file, key, path), key, path) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or damaged ({e}); export it again") from None


def _finite(tensor: np.ndarray, key: str, path: Path) -> np.ndarray:
    if tensor.dtype.kind in "fV" and not np.isfinite(tensor).all():
        raise UserError(f"{path}: {key} holds NaN or Inf; export the adapter again")
    return tensor
