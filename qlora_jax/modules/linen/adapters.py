"""Switches the adapters in a Linen module's params, and splits params for training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.variables import LoraParam
from qlora_jax.modules.adapters import check_together, strength
from qlora_jax.modules.checks import check_names, check_trained
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.linen.params import Params, adapters_of, replaced
from qlora_jax.runtime.errors import UserError


def use_adapter(params: Params, *names: str) -> Any:
    """Returns params in which the named adapters are on and all others are off.

    An adapter is off if its scale is 0. The scale is data, so switching compiles nothing.

    Args:
      params: params with adapters.
      names: names of the adapters to switch on; without a name, all are off.

    Raises:
      UserError: the params have no adapter of a name, or a DoRA adapter would be on together with
        another adapter of the same weight.
    """
    check_names(names, {name for _, name, _ in adapters_of(params)})

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Kernel):
            return leaf
        adapters = _copied(leaf.adapters)
        check_together(path, {name: x for name, x in adapters.items() if name in names})
        for name, adapter in adapters.items():
            strength(adapter, name in names)
        return dataclasses.replace(leaf, adapters=adapters)

    return replaced(params, one)


def split(params: Params, *names: str) -> tuple[dict[str, jax.Array], Any]:
    """Splits params into trained arrays and frozen params.

    Args:
      params: params with adapters.
      names: names of the adapters to train; without a name, all adapters are trained.

    Returns:
      Path to trained array, such as A and B of each adapter; and params without these arrays.
      `join` makes params of both.

    Raises:
      UserError: the params have no adapters, or no adapter of a name.
    """
    check_trained(names, {name for _, name, _ in adapters_of(params)})
    trained: dict[str, jax.Array] = {}

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Kernel):
            return leaf
        adapters = _copied(leaf.adapters)
        for name, adapter in adapters.items():
            if name in names or not names:
                for part, variable in _trained(adapter).items():
                    trained[f"{path}.{name}.{part}"] = variable.get_value()
                    variable.set_raw_value(None)
        return dataclasses.replace(leaf, adapters=adapters)

    frozen = replaced(params, one)
    return trained, frozen


def join(trained: Mapping[str, jax.Array], frozen: Params) -> Any:
    """Makes params of the two parts that `split` returns; also inside `jax.jit` and `jax.grad`.

    Args:
      trained: path to trained array.
      frozen: params without these arrays.

    Raises:
      UserError: an array is missing, or the params have no place for an array.
    """
    left = dict(trained)

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Kernel):
            return leaf
        adapters = _copied(leaf.adapters)
        for name, adapter in adapters.items():
            for part, variable in _trained(adapter).items():
                if variable.get_raw_value() is None:
                    own = f"{path}.{name}.{part}"
                    if own not in left:
                        raise UserError(f"join: {own} is missing; give all arrays that split gave")
                    variable.set_raw_value(left.pop(own))
        return dataclasses.replace(leaf, adapters=adapters)

    params = replaced(frozen, one)
    if left:
        raise UserError(f"join: the params have no place for {min(left)}; give what split gave")
    return params


def _copied(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    return {name: jax.tree.map(lambda x: x, adapter) for name, adapter in adapters.items()}


def _trained(adapter: Adapter) -> dict[str, nnx.Variable]:
    return {part: x for part, x in vars(adapter).items() if isinstance(x, LoraParam)}
