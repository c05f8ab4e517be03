"""Adapters that may be one of several over a base: plain LoRA, from a folder or a run directory."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_jax.formats.peft.adapter import CONFIG, AdapterSet
from qlora_jax.formats.peft.fit import check_linears
from qlora_jax.formats.peft.read import read_adapter
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

IN_RUN = "adapter"
"""Where a run directory keeps its adapter."""


def adapter_folder(path: str | Path) -> Path:
    """Returns the PEFT folder that a path names: itself, or the adapter of a run directory."""
    folder = Path(path).expanduser()
    inner = folder / IN_RUN
    is_run = not paths.exists(folder / CONFIG) and paths.exists(inner / CONFIG)
    return inner if is_run else folder


def read_plain(
    path: str | Path, linears: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, LoraWeights]:
    """Reads a plain LoRA adapter.

    Args:
      path: a folder in PEFT's format, or a run directory.
      linears: the model's module paths to (in_features, out_features), which the adapter must fit;
        None asks for no model.

    Raises:
      UserError: as `read_adapter`; or it is another kind of adapter, or does not fit the model.
    """
    folder = adapter_folder(path)
    adapters = plain(folder, read_adapter(folder))
    if linears is not None:
        check_linears(folder, adapters, linears)
    return adapters


def plain(folder: Path, stored: AdapterSet) -> dict[str, LoraWeights]:
    """Returns the adapters of a folder in float32, if they are plain LoRA.

    Args:
      folder: for messages.
      stored: what `read_adapter` read there.

    Raises:
      UserError: it is another kind of adapter, or more than the linears was trained.
    """
    if stored.replaced.tensors:
        raise UserError(
            f"{folder}: {next(iter(stored.replaced.tensors))} was trained beside the adapters, so "
            "it cannot be one of several adapters; merge it into the model instead"
        )
    for name, own in stored.adapters.items():
        if own.magnitude is not None:
            raise UserError(
                f"{folder}: {name} has magnitude, so it is no plain LoRA (DoRA, for one) and "
                "cannot be one of several adapters; merge it into the model instead"
            )
    return {
        name: own._replace(a=own.a.astype(np.float32), b=own.b.astype(np.float32))
        for name, own in stored.adapters.items()
    }
