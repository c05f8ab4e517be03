"""Knows which variables of a class of modules are kernels, and the axes of these kernels."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from qlora_jax.modules.axes import MATRIX, TABLE, Axes, checked, from_equation
from qlora_jax.modules.variables import FOUND
from qlora_jax.runtime.errors import UserError

Rule = Axes | str | Callable[[Any], Axes | str | None]
"""`Axes`, an einsum of input and weight, or a function of the module that returns one of these."""


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
"""Class to attribute to axes of the kernel. A subclass uses the entry of its nearest base."""

_SHAPES: Mapping[type, Callable[[Any], tuple[int, ...]]] = {
    nnx.Linear: lambda m: (m.in_features, m.out_features),
    nnx.LinearGeneral: lambda m: (*m.batch_axis.values(), *m.in_features, *m.out_features),
    nnx.Einsum: lambda m: tuple(m.kernel_shape),
    nnx.Embed: lambda m: (m.num_embeddings, m.features),
}
"""Class to the function that computes the shape of one layer's kernel from module attributes."""

TABLES = (nnx.Embed,)
"""Classes whose kernels are tables of rows; tables are quantized only with embeddings=True."""

_BY_SHAPE: Mapping[str, Callable[[Any], str | None]] = {
    "w": lambda module: getattr(module, "einsum_str", None),
}
"""Attribute to the module's einsum, for any class that stores one, such as tunix's `Einsum`."""


def register_kernel(cls: type[nnx.Module], name: str, axes: Rule) -> None:
    """Registers a weight of your own class of modules, with the axes that its product sums over.

    Args:
      cls: class of NNX modules; the registration also holds for subclasses.
      name: attribute of the module that holds the weight.
      axes: einsum of input and weight, such as "...k,kn->...n"; `Axes`; or function of the module
        that returns one of these. The axes are those of one layer, without a stack's leading axes.

    Raises:
      UserError: `cls` is no class of NNX modules, or the axes are no matrix product.

    Example:
      ```python
      qj.register_kernel(MyDense, "weight", "...k,kn->...n")
      ```
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        raise UserError(f"register_kernel: {cls!r} is no class of NNX modules; give one")
    if not callable(axes):
        _read(axes, f"{cls.__name__}.{name}")
    own = _RULES.setdefault(cls, dict(_rules_of(cls) or {}))
    own[name] = axes


def axes_of(module: nnx.Module, name: str, path: str) -> Axes | None:
    """Returns the axes of a module's variable; None if they are not known.

    Args:
      module: module that holds the variable.
      name: attribute that holds the variable.
      path: path of the variable, for errors.

    Raises:
      UserError: the axes that the module's class gives are no matrix product.
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
    """Raises UserError if the axes of a stack are not in front of the axes of a layer's weight.

    Args:
      module: module that holds the weight.
      path: path of the weight, for the error.
      own: sizes of the weight's last axes, as many as one layer's weight has.
    """
    shapes = (_SHAPES[base] for base in type(module).__mro__ if base in _SHAPES)
    expected = next(shapes, None)
    if expected is not None and expected(module) != own:
        raise UserError(
            f"{path}: a layer's weight is {expected(module)}, but the last axes of this stack are "
            f"{own}; stack the layers along axis 0"
        )


def is_understood(module: nnx.Module, name: str) -> bool:
    """Checks if a variable without axes is known not to be a kernel.

    It is known if the module's class has rules, or if `discover` has recorded the variable's uses.
    """
    return getattr(module, name).has_metadata(FOUND) or _rules_of(type(module)) is not None


def is_table(module: nnx.Module, name: str) -> bool:
    """Checks if a variable is a table whose rows are looked up."""
    found = getattr(module, name).get_metadata(FOUND, None)
    return found.table if found else isinstance(module, TABLES)


def _rules_of(cls: type) -> dict[str, Rule] | None:
    return next((_RULES[base] for base in cls.__mro__ if base in _RULES), None)


def _read(rule: Axes | str, path: str) -> Axes:
    if isinstance(rule, str):
        return from_equation(rule, path)
    axes = Axes(*rule)
    return checked(axes, path, len(axes.order))
