"""Arrays into an adapter folder, whole or not at all."""

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
    """Writes a folder that PEFT loads; an adapter that is there already is replaced.

    The folder appears whole or not at all. Scaling constant, which PEFT lacks, is written as
    alpha/r with alpha = constant · r. Modules of rank 0 are left out.

    Args:
      folder: where; its parents are made.
      adapters: Hugging Face module path, e.g. `model.layers.0.self_attn.q_proj`, to its adapter;
        all have a magnitude, or none has.
      base_name: the model it belongs to, as a name or path.
      revision: of the model, where it is a hub's.
      scaling: how alpha becomes the factor.
      dropout: recorded for whoever trains on.
      replaced: parameters of the base that belong to the adapters.
      modules: paths of all modules of the model that PEFT can adapt, so that `target_modules` may
        hold short names; None writes whole paths.

    Raises:
      UserError: nothing to write, the folder holds something else, or the disk is full.
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
        # save_file takes the memory as it lies, so a transposed view would be scrambled.
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
    # PEFT wraps an adapted linear, whose own bias then lies one level deeper.
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
