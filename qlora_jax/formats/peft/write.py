"""Writes adapters as a PEFT folder, completely or not at all."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from qlora_jax.formats.peft.adapter import CONFIG, PREFIX, WEIGHTS, Replaced, tensor_keys
from qlora_jax.formats.peft.config import make_config
from qlora_jax.formats.tensors import save
from qlora_jax.lora.spec import Scaling
from qlora_jax.lora.weights import LoraSet
from qlora_jax.runtime import paths
from qlora_jax.runtime.atomic import atomic_folder
from qlora_jax.runtime.errors import UserError

NOTHING = Replaced()


def write_adapter(
    folder: Path,
    adapters: LoraSet,
    *,
    base_name: str,
    revision: str | None = None,
    scaling: Scaling = "alpha/r",
    dropout: float = 0.0,
    replaced: Replaced = NOTHING,
    modules: Collection[str] | None = None,
) -> None:
    """Writes a folder that PEFT can load. An existing adapter in the folder is replaced.

    The folder is written completely or not at all. PEFT has no scaling "constant", so it is
    written as alpha/r with alpha = constant · r. Modules of rank 0 are left out.

    Args:
      folder: folder to write; missing parents are created.
      adapters: Hugging Face module path, e.g. `model.layers.0.self_attn.q_proj`, to adapter.
        Either all adapters have a magnitude or none.
      base_name: name or path of the base model.
      revision: revision of the base model on the hub; None without one.
      scaling: formula of the scale from alpha and rank.
      dropout: dropout rate, recorded for further training.
      replaced: parameters of the base that belong to the adapters.
      modules: paths of all modules of the model that PEFT can adapt. With them, `target_modules`
        can hold short names; None: it holds whole paths.

    Raises:
      UserError: no module has a rank above 0, the folder holds other files, or the disk is full.
    """
    present = {path: adapter for path, adapter in adapters.items() if adapter.rank > 0}
    if not present:
        raise UserError(
            f"{folder}: no module is adapted, so there is nothing to write; "
            "give an adapter with modules"
        )
    _check_replaceable(folder)
    tensors = {}
    for path, adapter in present.items():
        # save_file writes the memory in its order, so a transposed view would be written wrongly.
        parts = {"A": adapter.a.T, "B": adapter.b.T, "magnitude": adapter.magnitude}
        for part, key in tensor_keys(path, adapter.magnitude is not None).items():
            tensors[key] = np.ascontiguousarray(parts[part])
    for name, array in replaced.tensors.items():
        tensors[_key(name, present)] = np.ascontiguousarray(array)
    config = make_config(
        present,
        base_name=base_name,
        revision=revision,
        scaling=scaling,
        dropout=dropout,
        replaced=replaced,
        modules=modules,
    )
    with atomic_folder(folder) as new:
        save(tensors, new / WEIGHTS)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _key(name: str, adapted: LoraSet) -> str:
    # PEFT wraps an adapted linear, so the path of the linear's bias gets one more level.
    module, _, kind = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{kind}" if module in adapted else f"{PREFIX}{name}"


def _check_replaceable(folder: Path) -> None:
    if not paths.exists(folder):
        return
    if not paths.is_dir(folder):
        raise UserError(f"{folder}: a file is in the way; give another folder")
    if other := sorted({p.name for p in folder.iterdir()} - {CONFIG, WEIGHTS}):
        raise UserError(
            f"{folder}: holds {other[0]}, which is not an adapter's; give an empty or a new folder"
        )
