"""The adapters in a Linen module's params: which are on, and which are trained."""

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
    """Returns params in which the named adapters are on and all others off; no name is the base.

    Which are on is data (their scale): a compiled program serves any choice.

    Raises:
      UserError: an adapter that the params do not have, or a DoRA adapter beside another one.
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
    """Takes params apart into what is trained and what is frozen.

    Args:
      params: params with adapters.
      names: names of the adapters that are trained; none given is all.

    Returns:
      A and B, and what else of the adapters is trained, by path; and everything else. `join` puts
      them together.

    Raises:
      UserError: an adapter that the params do not have; params without adapters.
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
    """Puts together what `split` took apart, inside `jax.jit` and `jax.grad` as well.

    Raises:
      UserError: arrays that are missing, or that the params have no place for.
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
