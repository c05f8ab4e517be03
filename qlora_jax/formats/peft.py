"""Adapters in PEFT's format: adapter_config.json beside adapter_model.safetensors."""

import dataclasses
import json
import math
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora_jax import paths
from qlora_jax.atomic import storage_error
from qlora_jax.errors import UserError

Scaling = Literal["alpha/r", "alpha/sqrt(r)", "constant"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")

OTHER_FUNCTIONS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT that, when set, make an adapter compute something else than W + s·B·A."""

PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base weights as they are."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapted linear: x·W becomes x·W + factor · (x·a)·b.

    `a` is [in, rank] and `b` is [rank, out], the transposes of PEFT's. Both may be padded with
    zeros to a common rank: the first `rank` columns and rows count. `alpha` becomes the factor by
    the adapter set's scaling rule.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    rank: int


@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """What an adapter folder holds. `scaling` is alpha/r or alpha/sqrt(r)."""

    adapters: dict[str, Adapter]
    scaling: Scaling
    base_name: str
    dropout: float


def factor(adapter: Adapter, scaling: Scaling) -> float:
    """The number that multiplies b·a."""
    match scaling:
        case "alpha/r":
            return adapter.alpha / adapter.rank
        case "alpha/sqrt(r)":
            return adapter.alpha / math.sqrt(adapter.rank)
        case "constant":
            return adapter.alpha


def write_adapter(
    folder: Path,
    adapters: Mapping[str, Adapter],
    *,
    base_name: str,
    revision: str | None = None,
    scaling: Scaling = "alpha/r",
    dropout: float = 0.0,
) -> None:
    """Writes a folder that PEFT loads; an adapter that is there already is replaced.

    The folder appears whole or not at all. Scaling constant, which PEFT lacks, is written as
    alpha/r with alpha = constant · r. Modules of rank 0 are left out.

    Args:
      folder: where; its parents are made.
      adapters: Hugging Face module path, e.g. `model.layers.0.self_attn.q_proj`, to its adapter.
      base_name: the model it belongs to, as a name or path.
      revision: of the model, where it is a hub's.
      scaling: how alpha becomes the factor.
      dropout: recorded for whoever trains on.

    Raises:
      UserError: nothing to write, the folder holds something else, or the disk is full.
    """
    present = {path: adapter for path, adapter in adapters.items() if adapter.rank > 0}
    if not present:
        raise UserError(f"{folder}: no module is adapted, so there is nothing to write")
    _check_replaceable(folder)
    tensors = {}
    for path, adapter in present.items():
        a, b = adapter.a[:, : adapter.rank], adapter.b[: adapter.rank]
        # save_file takes the memory as it lies, so a transposed view would be scrambled.
        tensors[f"{PREFIX}{path}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = np.ascontiguousarray(b.T)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            new, old = Path(work, "new"), Path(work, "old")
            new.mkdir()
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            config = _config(present, base_name, revision, scaling, dropout)
            (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except BaseException:
                if old.exists():
                    os.replace(old, folder)
                raise
    except (OSError, SafetensorError) as e:
        problem = storage_error(folder.parent, e)
        if problem is None:
            raise
        raise problem from None


def read_adapter(folder: Path) -> AdapterSet:
    """Reads a LoRA adapter in PEFT's format, in the dtypes it is stored in.

    Raises:
      UserError: a file is missing or damaged, a tensor is missing, unexpected or of another rank
        than the config says, or the config asks for something else than plain LoRA.
    """
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS)
    pairs: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    unexpected = []
    for key, tensor in tensors.items():
        if match := KEY.fullmatch(key):
            pairs[match[1]][match[2]] = tensor
        else:
            unexpected.append(key)
    if unexpected:
        raise UserError(f"{folder / WEIGHTS}: unexpected tensors: {', '.join(sorted(unexpected))}")
    missing = [
        f"{PREFIX}{path}.lora_{side}.weight"
        for path, pair in pairs.items()
        for side in "AB"
        if side not in pair
    ]
    targets = config["target_modules"]
    if isinstance(targets, list):
        untouched = [t for t in targets if not any(f".{path}".endswith(f".{t}") for path in pairs)]
        missing += [f"any module {target}" for target in untouched]
    if missing or not pairs:
        raise UserError(f"{folder / WEIGHTS}: missing: {', '.join(missing) or 'every tensor'}")
    return AdapterSet(
        adapters={p: _adapter(p, pair, config, folder) for p, pair in pairs.items()},
        scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
        base_name=config.get("base_model_name_or_path") or "",
        dropout=float(config.get("lora_dropout") or 0.0),
    )


def _adapter(
    path: str, pair: Mapping[str, np.ndarray], config: Mapping[str, Any], folder: Path
) -> Adapter:
    a, b = pair["A"], pair["B"]
    rank = _by_pattern(config.get("rank_pattern"), path, config["r"])
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(
            f"{folder / WEIGHTS}: {path} has A {list(a.shape)} and B {list(b.shape)}, but "
            f"{CONFIG} says rank {rank}"
        )
    alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return Adapter(a=np.ascontiguousarray(a.T), b=np.ascontiguousarray(b.T), alpha=alpha, rank=rank)


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    # PEFT's rule: the first key that, as a regular expression, matches the path's end.
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _config(
    adapters: Mapping[str, Adapter],
    base_name: str,
    revision: str | None,
    scaling: Scaling,
    dropout: float,
) -> dict[str, Any]:
    ranks = {path: adapter.rank for path, adapter in adapters.items()}
    alphas = {
        path: _number(adapter.alpha * (adapter.rank if scaling == "constant" else 1))
        for path, adapter in adapters.items()
    }
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": scaling == "alpha/sqrt(r)",
        "use_dora": False,
        "target_modules": _targets(adapters),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": dropout,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {path: value for path, value in values.items() if value != common}


def _targets(paths: Iterable[str]) -> list[str]:
    """Short names if every layer up to the last has all of them, else whole paths.

    PEFT adapts whatever ends in a short name, so these would claim too much in the other case.
    """
    layers: dict[str, set[int]] = defaultdict(set)
    paths = sorted(paths)
    for path in paths:
        found = re.search(r"\.(\d+)\.", path)
        kind = re.sub(r"\.\d+\.", ".*.", path, count=1)
        layers[kind].update([int(found[1])] if found else [])
    last = max((max(indices) for indices in layers.values() if indices), default=-1)
    whole = all(len(indices) in (0, last + 1) for indices in layers.values())
    return sorted({path.rpartition(".")[2] for path in paths}) if whole else paths


def _check_replaceable(folder: Path) -> None:
    if not paths.exists(folder):
        return
    if not paths.is_dir(folder):
        raise UserError(f"{folder}: a file is in the way; give another folder")
    if other := sorted({p.name for p in folder.iterdir()} - {CONFIG, WEIGHTS}):
        raise UserError(
            f"{folder}: holds {other[0]}, which is not an adapter's; give an empty or a new folder"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; an adapter in PEFT's format has one") from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); export the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; export the adapter again")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA"
        )
    if absent := [key for key in ("r", "lora_alpha", "target_modules") if key not in config]:
        raise UserError(f"{path}: key {absent[0]} is missing")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {config['bias']!r} is not supported; supported: none")
    for key in OTHER_FUNCTIONS:
        if config.get(key):
            raise UserError(f"{path}: {key} is set, and only plain LoRA adapters are supported")
    if (init := config.get("init_lora_weights")) not in PLAIN_INITS:
        raise UserError(
            f"{path}: init_lora_weights {init!r} changes the base weights; convert it to a plain "
            "LoRA adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not paths.is_file(path):
        raise UserError(f"{path}: no such file; an adapter in PEFT's format has one")
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or damaged ({e}); export it again") from None
