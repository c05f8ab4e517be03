"""Finds the axes of weights of unknown classes by one abstract call of the model."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qlora_jax.modules.adapt import adapt, is_adapted, restore
from qlora_jax.modules.axes import TABLE, Axes
from qlora_jax.modules.candidates import check_model, owned
from qlora_jax.modules.kernel_rules import axes_of
from qlora_jax.modules.uses import PATH, Use, recording
from qlora_jax.modules.variables import FOUND, KnownVariable


def discover(
    model: nnx.Module, *args: Any, method: str = "__call__", **kwargs: Any
) -> dict[str, Axes]:
    """Finds the axes of a model's weights that products sum over, and stores them in the variables.

    The function traces one call of the model and computes nothing. Afterwards, functions with an
    argument `where` skip weights that no product and no look-up uses.

    Args:
      model: NNX model.
      args: arguments of the call, arrays or their shapes.
      method: name of the method to call.
      kwargs: keyword arguments of the call.

    Returns:
      Path to axes, for each newly found weight that a product or a look-up uses.

    Raises:
      UserError: the model is no NNX module.
    """
    uses = uses_of(check_model(model), args, kwargs, method)
    found = {}
    for path, module, name, variable in owned(model):
        if path not in uses or axes_of(module, name, path) is not None:
            continue
        axes = [use.axes for use in uses[path] if use.axes is not None]
        table = any(use.kind == "rows" for use in uses[path])
        # a weight that is looked up and also multiplied is stored as a table
        first = TABLE if table else next(iter(axes), None)
        variable.set_metadata(FOUND, KnownVariable(first, table))
        if first is not None:
            found[path] = first
    return found


def uses_of(
    model: nnx.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str
) -> dict[str, list[Use]]:
    """Returns path to uses of each weight in one abstract call; [] if the call does not read it."""
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
