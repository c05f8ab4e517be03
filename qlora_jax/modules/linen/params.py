"""Reads and replaces the params of a Linen module by dotted paths."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import FrozenDict, freeze, meta

from qlora_jax.lora.adapter import Adapter
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.linen.intercept import kernel_within
from qlora_jax.runtime.errors import UserError

Params = Mapping[str, Any]
"""Collection `params` of a Linen module; each leaf is an array or a `Kernel`."""


def check_module(module: Any) -> nn.Module:
    """Checks that a module is a Linen module, and returns it.

    Raises:
      UserError: the module is no Linen module.
    """
    if isinstance(module, nn.Module):
        return module
    remedy = "give the module itself"
    if isinstance(module, nnx.Module):
        remedy = "use quantize_model, add_lora and the others of qlora_jax with it"
    raise UserError(f"{type(module).__name__} is no flax.linen module; {remedy}")


def check_params(params: Any) -> Params:
    """Checks that params are a mapping of params, and returns them.

    Raises:
      UserError: the params are no mapping, or hold all collections of variables.
    """
    if isinstance(params, nnx.Module):
        raise UserError(
            f"{type(params).__name__} is a flax.nnx module and holds its weights itself; use "
            "the functions of qlora_jax with it"
        )
    if not isinstance(params, Mapping):
        raise UserError(f"params: {type(params).__name__} is no dict; give variables['params']")
    if isinstance(params.get("params"), Mapping):
        raise UserError("params: holds all collections of variables; give variables['params']")
    return params


def leaves_of(params: Params) -> dict[str, Any]:
    """Returns the arrays and kernels of params by path; boxes of metadata stay around them."""
    flat = traverse_util.flatten_dict(dict(check_params(params)))
    return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def kernels_of(params: Params) -> dict[str, Kernel]:
    """Returns the kernels of params by path."""
    found = {path: kernel_within(leaf) for path, leaf in leaves_of(params).items()}
    return {path: kernel for path, kernel in found.items() if kernel is not None}


def adapters_of(params: Params) -> Iterator[tuple[str, str, Adapter]]:
    """Yields the path of the weight, the name and the adapter, for each adapter of params."""
    for path, kernel in kernels_of(params).items():
        for name, adapter in kernel.adapters.items():
            yield path, name, adapter


def replaced(params: Params, change: Callable[[str, Any], Any]) -> Any:
    """Returns params in which each leaf is replaced by change(path, leaf).

    The dicts keep their type. Boxes of metadata stay, and `change` gets the content of a box.
    """

    def one(parts: tuple[str, ...], leaf: Any) -> Any:
        kernel = kernel_within(leaf)
        new = change(".".join(map(str, parts)), meta.unbox(leaf) if kernel is None else kernel)
        return leaf.replace_boxed(new) if isinstance(leaf, meta.AxisMetadata) else new

    flat = traverse_util.flatten_dict(dict(check_params(params)), keep_empty_nodes=True)
    empty = traverse_util.empty_node
    new = {parts: x if x is empty else one(parts, x) for parts, x in flat.items()}
    tree = traverse_util.unflatten_dict(new)
    return freeze(tree) if isinstance(params, FrozenDict) else tree
