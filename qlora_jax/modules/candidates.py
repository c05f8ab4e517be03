"""Finds the weights of an NNX model that can be quantized or adapted, by their paths."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.variables import LoraParam
from qlora_jax.lora.where import Where, chosen, matching
from qlora_jax.modules.adapt import variables_of
from qlora_jax.modules.axes import Axes, all_matrices_shape, checked
from qlora_jax.modules.checks import warn_left_out
from qlora_jax.modules.kernel_rules import axes_of, check_stack, is_table, is_understood
from qlora_jax.modules.variables import FOUND, QWeight
from qlora_jax.runtime.errors import UserError

Owned = tuple[str, nnx.Module, str, nnx.Variable]
"""Path, module, attribute and variable of a weight."""


class Candidate(NamedTuple):
    """A weight, and the modules that hold its variable.

    Attributes:
      path: path of the variable, such as layers.0.attention.query.kernel; the first path if there
        are several.
      variable: variable of the weight.
      owners: modules that hold the variable, each with the name of the attribute.
      axes: axes of one layer's weight.
      table: True for a table whose rows are looked up, such as an embedding.
    """

    path: str
    variable: nnx.Variable
    owners: list[tuple[nnx.Module, str]]
    axes: Axes
    table: bool

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Returns the shape of one layer's weight."""
        return self.axes.own(_shape(self.variable))

    @property
    def matrices_shape(self) -> tuple[int, ...]:
        """Returns the shape of the weight's matrices, (*stack, *batch, K, N)."""
        return all_matrices_shape(self.axes, _shape(self.variable))


def check_model(model: Any) -> nnx.Module:
    """Checks that a model is an NNX module, and returns it.

    Raises:
      UserError: the model is no NNX module.
    """
    if isinstance(model, nnx.Module):
        return model
    linen = "flax.linen" in {c.__module__.rpartition(".")[0] for c in type(model).__mro__}
    remedy = "use qlora_jax.linen with it and its params" if linen else "give the model itself"
    raise UserError(f"{type(model).__name__} is no flax.nnx module; {remedy}")


def owned(model: nnx.Module) -> Iterator[Owned]:
    """Yields the path, module, attribute and variable of each of a model's weights.

    A weight is a `QWeight`, or a parameter with two or more axes that is not part of an adapter. A
    weight that several modules hold is yielded once for each of them.
    """
    inside = {id(m) for _, m in nnx.iter_modules(model) if isinstance(m, Adapter)}
    for parts, module in nnx.iter_modules(model):
        if id(module) in inside:
            continue
        for name, variable in variables_of(module).items():
            weight = isinstance(variable, nnx.Param) and not isinstance(variable, LoraParam)
            if isinstance(variable, QWeight) or (weight and len(_shape(variable)) > 1):
                yield ".".join(map(str, (*parts, name))), module, name, variable


def candidates(model: nnx.Module, where: Where) -> list[Candidate]:
    """Returns the weights that `where` matches.

    Raises:
      UserError: `where` matches no weight, or a weight whose axes are not known.
    """
    by_path = _by_path(model)
    parts = {path: items[0][1] for path, items in by_path.items()}
    found = [_candidate(by_path[path]) for path in chosen(where, parts, "weights")]
    warn_left_out(_left_out(model, where))
    return found


def _left_out(model: nnx.Module, where: Where) -> list[str]:
    """Returns the weights that `where` matches and that `discover` has found in no product."""
    others = {
        path: module
        for path, module, name, variable in owned(model)
        if variable.has_metadata(FOUND) and axes_of(module, name, path) is None
    }
    return list(matching(where, others))


def of_paths(model: nnx.Module, paths: Collection[str]) -> dict[str, Candidate]:
    """Returns the weights with these paths, without paths that the model does not have."""
    found = _by_path(model)
    return {path: _candidate(found[path]) for path in paths if path in found}


def _by_path(model: nnx.Module) -> dict[str, list[Owned]]:
    """Returns, by first path, each weight that may be a kernel, with all its owners."""
    found: dict[int, list[Owned]] = {}
    for item in owned(model):
        if not (axes_of(item[1], item[2], item[0]) is None and is_understood(item[1], item[2])):
            found.setdefault(id(item[3]), []).append(item)
    return {items[0][0]: items for items in found.values()}


def _candidate(items: list[Owned]) -> Candidate:
    path, module, name, variable = items[0]
    axes = axes_of(module, name, path)
    shape = _shape(variable)
    if axes is None:
        raise UserError(
            f"{path}: it is not known which axes of {type(module).__name__}.{name} {shape} are "
            "summed over; call qlora_jax.discover(model, *example), or qlora_jax.register_kernel"
            f"({type(module).__name__}, {name!r}, ...), or leave it out of `where`"
        )
    checked(axes, path, len(shape))
    check_stack(module, path, axes.own(shape))
    owners = [(item[1], item[2]) for item in items]
    return Candidate(path, variable, owners, axes, is_table(module, name))


def _shape(variable: nnx.Variable) -> tuple[int, ...]:
    if isinstance(variable, QWeight):
        return variable.shape
    shapes = [getattr(x, "shape", ()) for x in jax.tree.leaves(variable.get_raw_value())]
    return tuple(shapes[0]) if len(shapes) == 1 else ()
