"""The axes of weights whose class is not known, from one abstract call of the model."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qlora_jax.modules.adapt import adapt, is_adapted, restore
from qlora_jax.modules.axes import TABLE, Axes
from qlora_jax.modules.candidates import check_model, owned
from qlora_jax.modules.known import axes_of
from qlora_jax.modules.uses import PATH, Use, recording
from qlora_jax.modules.variables import FOUND, KnownVariable


def discover(
    model: nnx.Module, *args: Any, method: str = "__call__", **kwargs: Any
) -> dict[str, Axes]:
    """Finds out which axes of a model's weights are summed over, and keeps it in their variables.

    The model is called once, abstractly: nothing is computed. A weight that no product has is no
    longer offered to `where`.

    Args:
      model: an NNX model.
      args: arguments of the call, arrays or their shapes.
      method: the method that is called.
      kwargs: more arguments of the call.

    Returns:
      The axes by the path of the weight, for each that a product or a look-up has.
    """
    uses = uses_of(check_model(model), args, kwargs, method)
    found = {}
    for path, module, name, variable in owned(model):
        if path not in uses or axes_of(module, name, path) is not None:
            continue
        axes = [use.axes for use in uses[path] if use.axes is not None]
        table = any(use.kind == "rows" for use in uses[path])
        # a table that is multiplied as well is held by rows
        first = TABLE if table else next(iter(axes), None)
        variable.set_metadata(FOUND, KnownVariable(first, table))
        if first is not None:
            found[path] = first
    return found


def uses_of(
    model: nnx.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str
) -> dict[str, list[Use]]:
    """Returns what a call does with each weight, by path; [] for one that it does not read."""
    weights = list(owned(model))
    paths: dict[int, str] = {}
    strangers = []
    for path, module, _, variable in weights:
        paths.setdefault(id(variable), path)
        if not is_adapted(module):
            strangers.append(module)
    try:
        for _, module, _, variable in weights:
            variable.set_metadata(PATH, paths[id(variable)])
            adapt(module)
        graph, state = nnx.split((model, args, dict(kwargs)))

        def call(state: Any) -> None:
            model, args, kwargs = nnx.merge(graph, state)
            getattr(model, method)(*args, **kwargs)

        with recording() as uses:
            jax.eval_shape(call, state)
    finally:
        for _, _, _, variable in weights:
            if variable.has_metadata(PATH):
                variable.del_metadata(PATH)
        for module in strangers:
            restore(module)
    found: dict[str, list[Use]] = {path: [] for path in paths.values()}
    for use in dict.fromkeys(uses):
        found[use.name].append(use)
    return found
