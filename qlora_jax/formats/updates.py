"""A PEFT folder's adapter as updates of a given model's linears."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_jax.formats import peft
from qlora_jax.lora.update import Update, Updates
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

PLAIN = {"a", "b", "alpha", "rank"}
"""The fields of `peft.Adapter` that plain LoRA has."""
IN_RUN = "adapter"
"""Where a run directory keeps its adapter."""


def adapter_folder(path: str | Path) -> Path:
    """The PEFT folder that a path names: itself, or the adapter of a run directory."""
    folder = Path(path).expanduser()
    inner = folder / IN_RUN
    is_run = not paths.exists(folder / peft.CONFIG) and paths.exists(inner / peft.CONFIG)
    return inner if is_run else folder


def read_updates(
    path: str | Path, linears: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, Update]:
    """Reads a plain LoRA adapter.

    Args:
      path: a folder in PEFT's format, or a run directory.
      linears: the model's module paths to (in_features, out_features), which the adapter must fit;
        None asks for no model.

    Raises:
      UserError: as `peft.read_adapter`; or it is another kind of adapter, or does not fit the
        model.
    """
    folder = adapter_folder(path)
    updates = updates_of(folder, peft.read_adapter(folder))
    if linears is not None:
        check_fit(folder, updates, linears)
    return updates


def updates_of(folder: Path, stored: peft.AdapterSet) -> dict[str, Update]:
    """The same of what `peft.read_adapter` read; `folder` is for messages."""
    if stored.replaced.tensors:
        raise UserError(
            f"{folder}: {next(iter(stored.replaced.tensors))} was trained beside the adapters, so "
            "it cannot be one of several adapters; merge it into the model instead"
        )
    updates = {}
    for name, adapter in stored.adapters.items():
        _check_plain(folder, name, adapter)
        a, b = adapter.a[:, : adapter.rank], adapter.b[: adapter.rank]
        a, b = a.astype(np.float32), b.astype(np.float32)
        updates[name] = Update(a, b, peft.factor(adapter, stored.scaling))
    return updates


def _check_plain(folder: Path, name: str, adapter: peft.Adapter) -> None:
    values = {f.name: getattr(adapter, f.name) for f in dataclasses.fields(adapter)}
    if more := sorted(k for k, v in values.items() if k not in PLAIN and v is not None):
        raise UserError(
            f"{folder}: {name} has {more[0]}, so it is no plain LoRA (DoRA, for one) and cannot be "
            "one of several adapters; merge it into the model instead"
        )


def check_fit(folder: str | Path, updates: Updates, linears: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError where a model with these linears lacks one, or has it in another shape."""
    for name, update in updates.items():
        if name not in linears:
            raise UserError(
                f"{folder}: the model has no linear {name}; the adapter is another model's"
            )
        shape = update.a.shape[0], update.b.shape[1]
        if shape != tuple(linears[name]):
            raise UserError(
                f"{folder}: {name} is {list(shape)} (in, out) in the adapter and "
                f"{list(linears[name])} in the model; the adapter is another model's"
            )
