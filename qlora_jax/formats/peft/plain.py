"""Adapters that may be one of several over a base: plain LoRA, from a folder or a run directory."""

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
"""Where a run directory keeps its adapter."""


def adapter_folder(path: str | Path) -> Path:
    """Returns the PEFT folder that a path names: itself, or the adapter of a run directory."""
    folder = Path(path).expanduser()
    inner = folder / IN_RUN
    is_run = not paths.exists(folder / CONFIG) and paths.exists(inner / CONFIG)
    return inner if is_run else folder


def read_plain(path: str | Path, model: Decoder | None = None) -> dict[str, LoraWeights]:
    """Reads a plain LoRA adapter.

    Args:
      path: a folder in PEFT's format, or a run directory.
      model: the model that the adapter must fit; None asks for no model.

    Raises:
      UserError: as `read_adapter` and `plain`.
    """
    folder = adapter_folder(path)
    return plain(folder, read_adapter(folder), model)


def plain(
    where: object, stored: AdapterSet, model: Decoder | None = None
) -> dict[str, LoraWeights]:
    """Returns adapters in float32, if they are plain LoRA.

    Args:
      where: the adapter's folder, for messages.
      stored: what `read_adapter` read there.
      model: the model that the adapters must fit; None asks for no model.

    Raises:
      UserError: it is another kind of adapter, more than the linears was trained, or the adapters
        do not fit the model.
    """
    replaced = dict(stored.replaced.tensors)
    if model is not None:
        check_fits(stored, model.config, where)
        found = replaced_tensors(stored, model.config)
        replaced = {n: x for n, x in found.items() if not _holds(model, n, x)}
    if replaced:
        raise UserError(
            f"{where}: {next(iter(replaced))} was trained beside the adapters, so "
            "it cannot be one of several adapters; merge it into the model instead"
        )
    for name, own in stored.adapters.items():
        if own.magnitude is not None:
            raise UserError(
                f"{where}: {name} has magnitude, so it is no plain LoRA (DoRA, for one) and "
                "cannot be one of several adapters; merge it into the model instead"
            )
    return {
        name: own._replace(a=own.a.astype(np.float32), b=own.b.astype(np.float32))
        for name, own in stored.adapters.items()
    }


def check_shared(where: object, adapters: LoraSet) -> None:
    """Raises UserError if adapters cannot share a bank, which has no place for outer modules.

    Args:
      where: the adapter's folder, for the message.
      adapters: module paths to adapters.
    """
    for path in adapters:
        if path in EMBEDDINGS or path == HEAD:
            raise UserError(
                f"{where}: an adapter of {path} cannot be one of several; merge it into the model, "
                f"or leave {path} out of its target_modules"
            )


def _holds(model: Decoder, name: str, value: np.ndarray) -> bool:
    """Whether the model holds this value as a parameter of its own, in the dtype that it has."""
    embed, head = matrices(model.config)
    tied = name == head and model.config.tie_embeddings
    held = parameter(model, embed if tied else name)
    return np.array_equal(held, value.astype(held.dtype))
