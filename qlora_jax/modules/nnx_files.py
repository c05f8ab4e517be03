"""Saves and loads the adapters of an NNX model."""

from pathlib import Path
from typing import TypeVar

from flax import nnx

from qlora_jax.modules import files
from qlora_jax.modules.adapt import adapters_of
from qlora_jax.modules.adapters import check_together, on_with
from qlora_jax.modules.candidates import check_model, of_paths
from qlora_jax.modules.nnx_model import all_adapters, attach, matrices_of
from qlora_jax.runtime.errors import UserError

Model = TypeVar("Model", bound=nnx.Module)


def save_adapter(model: nnx.Module, folder: str | Path, name: str | None = None) -> None:
    """Writes an adapter of a model into a folder: adapter.safetensors and adapter.json.

    Args:
      model: NNX model with adapters.
      folder: folder to write; an adapter in this folder is replaced.
      name: name of the adapter; None if the model has only one.

    Raises:
      UserError: the model has no adapter of this name, or has several and no name is given; the
        folder holds other files or cannot be written.

    Example:
      ```python
      qj.save_adapter(model, "my-adapter")
      ```
    """
    files.write(files.named(all_adapters(check_model(model)), name), folder)


def load_adapter(model: Model, folder: str | Path, name: str = "default") -> Model:
    """Reads an adapter from a folder into a model, in place, and switches the adapter on.

    Args:
      model: NNX model with the weights that the adapter changes.
      folder: folder from `save_adapter`.
      name: name of the adapter in the model. Values of an adapter with this name are replaced;
        otherwise a new adapter is added.

    Returns:
      The same model.

    Raises:
      UserError: a file cannot be used, the model lacks a weight of the adapter or has it in another
        shape, or an adapter of this name has another rank or variant. The model then stays
        unchanged.

    Example:
      ```python
      qj.load_adapter(model, "my-adapter")
      ```
    """
    variant, saved = files.read(folder)
    found = of_paths(check_model(model), saved)
    files.check_fits(folder, saved, {p: c.matrices_shape for p, c in found.items()})
    own = {path: adapters_of(*c.owners[0]).get(name) for path, c in found.items()}
    for path, adapter in own.items():
        if adapter is not None and not files.fits(adapter, saved[path]):
            raise UserError(
                f"{path}: has an adapter {name!r} of another rank or variant; give another name"
            )
    made = {
        path: files.built(path, matrices_of(found[path]), variant, saved[path])
        for path, adapter in own.items()
        if adapter is None
    }
    for path, candidate in found.items():
        others = adapters_of(*candidate.owners[0])
        check_together(path, on_with(others, name, own[path] or made[path]))
    for path, adapter in own.items():
        if adapter is None:
            attach(found[path], name, made[path])
        else:
            files.replace_values(adapter, saved[path])
    return model
