"""Saves and loads the adapters in the params of a Linen module."""

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from flax import linen as nn

from qlora_jax.modules import files
from qlora_jax.modules.adapters import check_together, on_with
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.linen.choice import Given, weights
from qlora_jax.modules.linen.params import Params, adapters_of, check_module, leaves_of, replaced
from qlora_jax.runtime.errors import UserError


def save_adapter(params: Params, folder: str | Path, name: str | None = None) -> None:
    """Writes an adapter into a folder, as `qlora_jax.save_adapter` does for an NNX model.

    Args:
      params: params with adapters.
      folder: folder to write; an adapter in this folder is replaced.
      name: name of the adapter; None if the params have only one.

    Raises:
      UserError: the params have no adapter of this name, or have several and no name is given; the
        folder holds other files or cannot be written.
    """
    files.write(files.named(adapters_of(params), name), folder)


def load_adapter(
    module: nn.Module,
    params: Params,
    folder: str | Path,
    *example: Any,
    name: str = "default",
    axes: Given = MappingProxyType({}),
) -> Any:
    """Returns params with an adapter from a folder, switched on.

    Args:
      module: Linen module.
      params: params of the module.
      folder: folder from `save_adapter`.
      example: arguments of one abstract call, which shows the axes of weights that are no kernels.
      name: name of the adapter in the params. Values of an adapter with this name are replaced;
        otherwise a new adapter is added.
      axes: path of a weight to its axes, for weights whose axes the call does not have to show.

    Raises:
      UserError: a file cannot be used, the params lack a weight of the adapter or have it in
        another shape, or an adapter of this name has another rank or variant.
    """
    variant, saved = files.read(folder)
    here = [path for path in saved if path in leaves_of(params)]
    found = {}
    if here:
        chosen = weights(check_module(module), params, lambda path, _: path in here, example, axes)
        found = {weight.path: weight for weight in chosen}
    files.check_fits(folder, saved, {path: x.matrices_shape for path, x in found.items()})
    new: dict[str, Kernel] = {}
    for path, weight in found.items():
        own = weight.kernel.adapters.get(name)
        if own is None:
            adapter = files.built(path, weight.matrices, variant, saved[path])
        elif files.fits(own, saved[path]):
            adapter = jax.tree.map(lambda x: x, own)
            files.replace_values(adapter, saved[path])
        else:
            raise UserError(
                f"{path}: has an adapter {name!r} of another rank or variant; give another name"
            )
        check_together(path, on_with(weight.kernel.adapters, name, adapter))
        adapters = {**weight.kernel.adapters, name: adapter}
        new[path] = dataclasses.replace(weight.kernel, adapters=adapters)
    return replaced(params, lambda path, leaf: new.get(path, leaf))
