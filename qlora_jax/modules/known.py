"""Which variables of a module's class are kernels, and what their axes are."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from qlora_jax.modules.axes import MATRIX, TABLE, Axes, checked, from_equation
from qlora_jax.modules.variables import FOUND
from qlora_jax.runtime.errors import UserError

Rule = Axes | str | Callable[[Any], Axes | str | None]
"""Axes, an einsum of an input and the weight, or a function of the module that returns one."""


def _linear_general(module: Any) -> Axes:
    inputs, batch = len(module.in_features), len(module.batch_axis)
    summed = range(batch, batch + inputs)
    kept = range(batch + inputs, batch + inputs + len(module.out_features))
    return Axes(tuple(range(batch)), tuple(summed), tuple(kept))


_RULES: dict[type, dict[str, Rule]] = {
    nnx.Linear: {"kernel": MATRIX},
    nnx.LinearGeneral: {"kernel": _linear_general},
    nnx.Einsum: {"kernel": lambda module: module.einsum_str},
    nnx.Embed: {"embedding": TABLE},
    nnx.BatchNorm: {},
    nnx.LayerNorm: {},
    nnx.RMSNorm: {},
    nnx.GroupNorm: {},
}
"""Class to its kernels by attribute. A subclass has those of its nearest base that is here."""

_SHAPES: Mapping[type, Callable[[Any], tuple[int, ...]]] = {
    nnx.Linear: lambda m: (m.in_features, m.out_features),
    nnx.LinearGeneral: lambda m: (*m.batch_axis.values(), *m.in_features, *m.out_features),
    nnx.Einsum: lambda m: tuple(m.kernel_shape),
    nnx.Embed: lambda m: (m.num_embeddings, m.features),
}
"""Class to the shape that one layer's kernel has by what the module says of itself."""

TABLES = (nnx.Embed,)
"""Classes whose kernels are tables that are looked up; they are quantized only when asked for."""

_BY_SHAPE: Mapping[str, Callable[[Any], str | None]] = {
    "w": lambda module: getattr(module, "einsum_str", None),
}
"""Attribute to the equation of a module of any class that keeps it, as tunix's `Einsum` does."""


def register_kernel(cls: type[nnx.Module], name: str, axes: Rule) -> None:
    """Tells which axes of a class's variable a product sums over.

    Args:
      cls: a class of modules; its subclasses have the same kernel.
      name: the attribute that holds the variable.
      axes: an einsum of an input and the weight such as "...k,kn->...n"; `Axes`; or a function of
        the module that returns one of these. They are those of one layer: a stack's are in front.

    Raises:
      UserError: `cls` is no class of NNX modules, or the axes are no matrix product.
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        raise UserError(f"register_kernel: {cls!r} is no class of NNX modules; give one")
    if not callable(axes):
        _read(axes, f"{cls.__name__}.{name}")
    own = _RULES.setdefault(cls, dict(_rules_of(cls) or {}))
    own[name] = axes


def axes_of(module: nnx.Module, name: str, path: str) -> Axes | None:
    """Returns the axes of a module's variable; None where they are not known.

    Args:
      module: the module.
      name: the attribute that holds the variable.
      path: the variable's path, for errors.

    Raises:
      UserError: what a class says of itself is no matrix product.
    """
    variable = getattr(module, name)
    if found := variable.get_metadata(FOUND, None):
        return found.axes
    rules = _rules_of(type(module)) or {}
    rule: Any = rules.get(name, _BY_SHAPE.get(name))
    if callable(rule):
        rule = rule(module)
    return None if rule is None else _read(rule, path)


def check_stack(module: nnx.Module, path: str, own: tuple[int, ...]) -> None:
    """Raises UserError if a stack's axes are not in front of those of a layer's weight.

    Args:
      module: the module.
      path: path of the weight, for the error.
      own: the last axes of the weight, as many as a layer's has.
    """
    shapes = (_SHAPES[base] for base in type(module).__mro__ if base in _SHAPES)
    expected = next(shapes, None)
    if expected is not None and expected(module) != own:
        raise UserError(
            f"{path}: a layer's weight is {expected(module)}, and the last axes of this stack are "
            f"{own}; stack the layers along axis 0"
        )


def is_understood(module: nnx.Module, name: str) -> bool:
    """Returns whether a variable without axes is known to be no kernel.

    It is if the class is known, or a call has shown it.
    """
    return getattr(module, name).has_metadata(FOUND) or _rules_of(type(module)) is not None


def is_table(module: nnx.Module, name: str) -> bool:
    """Returns whether a variable is a table that is looked up."""
    found = getattr(module, name).get_metadata(FOUND, None)
    return found.table if found else isinstance(module, TABLES)


def _rules_of(cls: type) -> dict[str, Rule] | None:
    return next((_RULES[base] for base in cls.__mro__ if base in _RULES), None)


def _read(rule: Axes | str, path: str) -> Axes:
    if isinstance(rule, str):
        return from_equation(rule, path)
    axes = Axes(*rule)
    return checked(axes, path, len(axes.order))
