"""Reads plain LoRA adapters, which can share one base, from a PEFT folder or a run directory."""

from pathlib import Path

import numpy as np

from qlora_jax.formats.peft.adapter import CONFIG, AdapterSet
from qlora_jax.formats.peft.fit import check_fits, replaced_tensors
from qlora_jax.formats.peft.read import read_adapter
from qlora_jax.formats.tying import matrices
from qlora_jax.formats.unload import parameter
from qlora_jax.lora.weights import LoraSet, LoraWeights
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import EMBEDDINGS, HEAD
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

IN_RUN = "adapter"
"""Name of the adapter folder in a run directory."""


def adapter_folder(path: str | Path) -> Path:
    """Returns the PEFT folder for a path: the path itself, or the adapter of a run directory."""
    folder = Path(path).expanduser()
    inner = folder / IN_RUN
    is_run = not paths.exists(folder / CONFIG) and paths.exists(inner / CONFIG)
    return inner if is_run else folder


def read_plain(path: str | Path, model: Decoder | None = None) -> dict[str, LoraWeights]:
    """Reads a plain LoRA adapter.

    Args:
      path: a folder in PEFT's format, or a run directory.
      model: model that the adapter must fit; None: no such check.

    Raises:
      UserError: a condition of `read_adapter` or `plain`.
    """
    folder = adapter_folder(path)
    return plain(folder, read_adapter(folder), model)


def plain(
    where: object, stored: AdapterSet, model: Decoder | None = None
) -> dict[str, LoraWeights]:
    """Returns the adapters in float32, and checks that they are plain LoRA.

    Args:
      where: folder of the adapter, for messages.
      stored: result of `read_adapter` for this folder.
      model: model that the adapters must fit; None: no such check.

    Raises:
      UserError: the adapters are not plain LoRA, parameters of the base were trained too, or the
        adapters do not fit the model.
    """
    replaced = dict(stored.replaced.tensors)
    if model is not None:
        check_fits(stored, model.config, where)
        found = replaced_tensors(stored, model.config)
        replaced = {n: x for n, x in found.items() if not _holds(model, n, x)}
    if replaced:
        raise UserError(
            f"{where}: {next(iter(replaced))} was trained beside the adapters, so the adapter "
            "cannot be one of several adapters; merge it into the model instead"
        )
    for name, own in stored.adapters.items():
        if own.magnitude is not None:
            raise UserError(
                f"{where}: {name} has a magnitude, as in DoRA; this is not plain LoRA and "
                "cannot be one of several adapters; merge it into the model instead"
            )
    return {
        name: own._replace(a=own.a.astype(np.float32), b=own.b.astype(np.float32))
        for name, own in stored.adapters.items()
    }


def check_shared(where: object, adapters: LoraSet) -> None:
    """Raises UserError if an adapter of the embedding or the head is among the adapters.

    A bank holds only adapters of the layers' linears.

    Args:
      where: folder of the adapter, for the message.
      adapters: module path to adapter.
    """
    for path in adapters:
        if path in EMBEDDINGS or path == HEAD:
            raise UserError(
                f"{where}: an adapter of {path} cannot be one of several; merge it into the model, "
                f"or leave {path} out of its target_modules"
            )


def _holds(model: Decoder, name: str, value: np.ndarray) -> bool:
    """Returns whether a parameter equals `value`, rounded to the dtype of the parameter."""
    embed, head = matrices(model.config)
    tied = name == head and model.config.tie_embeddings
    held = parameter(model, embed if tied else name)
    return np.array_equal(held, value.astype(held.dtype))
