"""Calls of a Linen module with kernels in its params."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.linen.choice import found_in, uses_of
from qlora_jax.modules.linen.intercept import adapted, within
from qlora_jax.modules.linen.params import (
    Params,
    adapters_of,
    check_module,
    check_params,
    kernels_of,
    leaves_of,
    replaced,
)
from qlora_jax.modules.summary import Summary, counted, kind_of
from qlora_jax.modules.variables import KnownVariable
from qlora_jax.quant import QTensor


def apply(
    module: nn.Module,
    params: Params,
    *args: Any,
    method: Any = None,
    variables: Mapping[str, Any] = {},
    dropout_key: jax.Array | None = None,
    **kwargs: Any,
) -> Any:
    """Calls a module, as module.apply({"params": params, **variables}, *args, **kwargs) does.

    Args:
      module: a Linen module.
      params: its params, with kernels or without.
      args: arguments of the call.
      method: the method that is called, or its name; None is `__call__`.
      variables: other collections, such as batch_stats.
      dropout_key: key of this step's dropout on the adapters' inputs; without it nothing is
        dropped there. The module's own dropout has its key in `rngs`, as ever.
      kwargs: more arguments of the call, and `mutable` and `rngs`.

    Returns:
      What `module.apply` returns.

    Raises:
      UserError: the module writes to a weight in 4 bits or with adapters.
    """
    if dropout_key is not None:
        params = _with_keys(params, dropout_key)
    whole = {**variables, "params": check_params(params)}
    with adapted():
        return check_module(module).apply(whole, *args, method=method, **kwargs)


def _with_keys(params: Params, key: jax.Array) -> Any:
    """Returns params whose adapters have keys for dropout."""
    places = {path: i for i, path in enumerate(kernels_of(params))}

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Kernel):
            return leaf
        own = jax.random.fold_in(key, places[path])
        keys = {}
        for i, (name, adapter) in enumerate(sorted(leaf.adapters.items())):
            if adapter.dropout:
                shape = adapter.scale.get_value().shape
                split = jax.random.split(jax.random.fold_in(own, i), shape)
                keys[name] = jax.random.key_data(split)
        return dataclasses.replace(leaf, keys=keys)

    return replaced(params, one)


def discover(
    module: nn.Module,
    params: Params,
    *args: Any,
    method: Any = None,
    variables: Mapping[str, Any] = {},
    **kwargs: Any,
) -> dict[str, KnownVariable]:
    """Finds out which axes of a module's weights are summed over, by one abstract call.

    Args:
      module: a Linen module.
      params: its params, or their shapes.
      args: arguments of the call, arrays or their shapes.
      method: the method that is called, or its name; None is `__call__`.
      variables: other collections; those that the module makes itself may be left out.
      kwargs: more arguments of the call, and `mutable` and `rngs`.

    Returns:
      Path of each array of two axes or more to its axes (None if no product and no look-up has it)
      and whether it is a table that is looked up; an argument `axes` of `quantize` and `add_lora`.
    """
    uses = uses_of(check_module(module), params, args, kwargs, method, variables)
    kernels = kernels_of(params)
    return {path: found_in(own) for path, own in uses.items() if path not in kernels}


def summary(
    module: nn.Module,
    params: Params,
    *args: Any,
    method: Any = None,
    variables: Mapping[str, Any] = {},
    **kwargs: Any,
) -> Summary:
    """Counts what params hold.

    Args:
      module: a Linen module.
      params: its params, arrays or their shapes.
      args: example arguments of a call; with them the summary says which weights it decodes.
      method: the method that is called, or its name; None is `__call__`.
      variables: other collections, as in `discover`.
      kwargs: more arguments of the call.
    """
    check_module(module)
    values: list[tuple[str, Any]] = []
    for leaf in leaves_of(params).values():
        kernel = within(leaf)
        value = leaf if kernel is None else kernel.value
        values.append(("quantized" if isinstance(value, QTensor) else "frozen", value))
    for _, _, adapter in adapters_of(params):
        own = (x for x in vars(adapter).values() if isinstance(x, nnx.Variable))
        values += ((kind_of(x), x.get_raw_value()) for x in own)
    uses = uses_of(module, params, args, kwargs, method, variables) if args or kwargs else None
    names = [name for _, name, _ in adapters_of(params)]
    return counted(values, names, kernels_of(params), uses)
