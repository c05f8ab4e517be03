"""Represents a weight that becomes an array only if an operation needs the whole array."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from qlora_jax.modules.axes import Axes
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.uses import Use


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A weight that no operation has needed as an array yet.

    Attributes:
      name: name of the weight, for `uses`.
      kernel: value and adapters of the weight.
      order: order of the weight's axes after the transpositions so far.
      dtype: dtype after the casts so far.
      uses: list to which each operation on the weight is appended.
    """

    name: str
    kernel: Kernel
    order: tuple[int, ...]
    dtype: Any
    uses: list[Use]

    def array(self) -> jax.Array:
        """Returns the weight merged with its adapters, as an array."""
        return self.kernel.whole().astype(self.dtype).transpose(self.order)

    def base(self) -> jax.Array:
        """Returns the weight without adapters as an array."""
        return self.kernel.plain().astype(self.dtype).transpose(self.order)

    def used(self, kind: str, operation: str, axes: Axes | None = None) -> None:
        """Appends an operation on the weight to `uses`."""
        self.uses.append(Use(self.name, kind, operation, axes))

    def untouched(self) -> bool:
        """Checks if the axes are in their original order."""
        return self.order == tuple(range(len(self.order)))


def lazy(name: str, kernel: Kernel, uses: list[Use], dtype: Any = None) -> Lazy:
    """Makes the lazy weight of a kernel, before any operation."""
    order = tuple(range(len(kernel.stack) + len(kernel.shape)))
    return Lazy(name, kernel, order, dtype or kernel.dtype, uses)


def as_array(x: Any, operation: str) -> Any:
    """Returns a value as an array; a lazy weight is decoded, and `operation` is recorded for it."""
    if not isinstance(x, Lazy):
        return x
    x.used("decoded", operation)
    return x.array()


def bound(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Runs one operation of a jaxpr on arrays and returns its results."""
    found = equation.primitive.get_bind_params(equation.params)
    # until jax 0.10 this is a pair (functions, params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    with equation.ctx.manager:
        out = equation.primitive.bind(*functions, *inputs, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def is_stack(x: Lazy) -> bool:
    """Checks if the first axis of a lazy weight may be the axis of a stack of layers."""
    return x.untouched() and (x.kernel.axes is None or bool(x.kernel.stack))


def layer_of(stack: Lazy, kernel: Kernel) -> Lazy:
    """Returns one layer of a stack as a lazy weight.

    Args:
      stack: stack of layers.
      kernel: kernel of the stack with the arrays of one layer only.
    """
    if kernel.axes is None:
        kernel = dataclasses.replace(kernel, shape=kernel.shape[1:])
    return lazy(stack.name, kernel, stack.uses, stack.dtype)
