"""An adapter folder into arrays, strictly: every tensor is accounted for."""

import hashlib
import itertools
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
    PREFIX,
    WEIGHTS,
    AdapterSet,
    Replaced,
    listed,
)
from qlora_jax.formats.peft.config import by_pattern, read_config, targets_of
from qlora_jax.lora.spec import SCALINGS, Scaling
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.models.families import FAMILIES
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

PART = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:([AB])\.weight|(magnitude_vector))")
EMBEDDINGS = frozenset(
    f"{module}.weight" for f in FAMILIES.values() for module in (f.names.embed, f.names.head)
)
"""The names of the embedding and of the head in every family."""
BIAS = re.compile(re.escape(PREFIX) + r"(.+?)(?:\.base_layer)?\.bias")


def read_adapter(folder: Path) -> AdapterSet:
    """Reads a LoRA or DoRA adapter in PEFT's format, in the dtypes it is stored in.

    Raises:
      UserError: a file is missing or damaged, a tensor is missing, unexpected, not finite or of
        another shape than the config says, or the config asks for something that is not LoRA or
        DoRA.
    """
    config = read_config(folder / CONFIG)
    saved = tuple(config.get("modules_to_save") or ())
    bias = config.get("bias", "none")
    parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    replaced, unexpected = {}, []
    for key, tensor in _read_tensors(folder / WEIGHTS).items():
        if "lora_embedding_" in key:
            raise UserError(
                f"{folder / WEIGHTS}: {key}: adapters of embeddings are not supported; leave "
                "embed_tokens out of target_modules, or train it whole by modules_to_save"
            )
        if match := PART.fullmatch(key):
            parts[match[1]][match[2] or "magnitude"] = tensor
        elif (name := _whole(key, saved)) or (name := _embedding(key)):
            replaced[name] = tensor
        elif bias != "none" and (match := BIAS.fullmatch(key)):
            replaced[f"{match[1]}.bias"] = tensor
        else:
            unexpected.append(key)
    if unexpected:
        raise UserError(f"{folder / WEIGHTS}: unexpected tensors: {listed(unexpected)}")
    missing = _missing(config, parts)
    if missing or not parts:
        raise UserError(f"{folder / WEIGHTS}: missing: {listed(missing) or 'every tensor'}")
    scaling: Scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    return AdapterSet(
        {path: _weights(path, found, config, scaling, folder) for path, found in parts.items()},
        scaling,
        base_name=config.get("base_model_name_or_path") or "",
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=targets_of(config),
        replaced=Replaced(replaced, saved, bias, bool(config.get("ensure_weight_tying"))),
    )


def sha256(folder: Path) -> str:
    """Digest of an adapter's tensors as they are on disk, as hex."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _embedding(key: str) -> str | None:
    """Returns the parameter's name, if it is an embedding or a head.

    PEFT saves them beside an adapter that targets one of them, or whose vocabulary was resized
    (`save_embedding_layers`).
    """
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    return name if name in EMBEDDINGS else None


def _whole(key: str, saved: tuple[str, ...]) -> str | None:
    """The parameter's name in the base, if its module is one of those saved whole."""
    name = key.removeprefix(PREFIX)
    return name if key.startswith(PREFIX) and any(within(name, s) for s in saved) else None


def within(name: str, saved: str) -> bool:
    """Whether a parameter belongs to a module that `modules_to_save` names.

    The module's path ends in the name, in the middle of a word too, as PEFT takes it: norm stands
    for input_layernorm as well.
    """
    modules = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
    return any(module.endswith(saved) for module in modules)


def _missing(config: Mapping[str, Any], parts: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Returns the tensors that an adapter of the file lacks."""
    names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    if config.get("use_dora"):
        names["magnitude"] = "lora_magnitude_vector"
    return [
        f"{PREFIX}{path}.{name}"
        for path, found in parts.items()
        for part, name in names.items()
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
            f"{CONFIG} says rank {rank}"
        )
    if magnitude is not None and not config.get("use_dora"):
        raise UserError(
            f"{folder / WEIGHTS}: unexpected tensors: {PREFIX}{path}.lora_magnitude_vector, since "
            f"{CONFIG} does not say use_dora"
        )
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise UserError(
            f"{folder / WEIGHTS}: {path} has a magnitude {list(magnitude.shape)} for "
            f"{b.shape[0]} outputs"
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
