"""Calls a Linen module whose params hold kernels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.linen.choice import found_in, uses_of
from qlora_jax.modules.linen.intercept import adapted, kernel_within
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
    """Calls a module like module.apply({"params": params, **variables}, *args, **kwargs).

    Args:
      module: Linen module.
      params: params of the module, with or without kernels.
      args: arguments of the call.
      method: method to call, or its name; None is `__call__`.
      variables: other collections, such as batch_stats.
      dropout_key: key of the dropout on the adapters' inputs in this step; None drops nothing
        there. The module's own dropout takes its key from `rngs`.
      kwargs: keyword arguments of the call, and `mutable` and `rngs`.

    Returns:
      The same as `module.apply`.

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
    """Finds the axes of a module's weights that products sum over, by one abstract call.

    Args:
      module: Linen module.
      params: params of the module, arrays or shapes.
      args: arguments of the call, arrays or shapes.
      method: method to call, or its name; None is `__call__`.
      variables: other collections; those that the module makes itself may be left out.
      kwargs: keyword arguments of the call, and `mutable` and `rngs`.

    Returns:
      Path of each array with two or more axes to its axes (None if no product and no look-up uses
      the array) and to whether it is a table. Give this dict to `quantize` and `add_lora` as
      `axes`.
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
    """Counts parameters and bytes of params: quantized, trained and frozen.

    Args:
      module: Linen module.
      params: params of the module, arrays or shapes.
      args: example arguments of a call; with them the summary also lists the weights that this call
        decodes as a whole.
      method: method to call, or its name; None is `__call__`.
      variables: other collections, as in `discover`.
      kwargs: keyword arguments of the call.
    """
    check_module(module)
    values: list[tuple[str, Any]] = []
    for leaf in leaves_of(params).values():
        kernel = kernel_within(leaf)
        value = leaf if kernel is None else kernel.value
        values.append(("quantized" if isinstance(value, QTensor) else "frozen", value))
    for _, _, adapter in adapters_of(params):
        own = (x for x in vars(adapter).values() if isinstance(x, nnx.Variable))
        values += ((kind_of(x), x.get_raw_value()) for x in own)
    uses = uses_of(module, params, args, kwargs, method, variables) if args or kwargs else None
    names = [name for _, name, _ in adapters_of(params)]
    return counted(values, names, kernels_of(params), uses)
