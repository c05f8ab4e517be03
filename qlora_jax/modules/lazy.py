"""A weight that is not an array until an operation needs one."""

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
      name: its name, for `uses`.
      kernel: its value and adapters.
      order: its axes, as transpositions have moved them.
      dtype: dtype to which it has been cast.
      uses: what is told of each operation on it.
    """

    name: str
    kernel: Kernel
    order: tuple[int, ...]
    dtype: Any
    uses: list[Use]

    def array(self) -> jax.Array:
        """Returns the weight as an array, with what its adapters add."""
        return self.kernel.whole().astype(self.dtype).transpose(self.order)

    def base(self) -> jax.Array:
        """Returns the weight as an array, without adapters."""
        return self.kernel.plain().astype(self.dtype).transpose(self.order)

    def used(self, kind: str, operation: str, axes: Axes | None = None) -> None:
        """Tells of an operation."""
        self.uses.append(Use(self.name, kind, operation, axes))

    def untouched(self) -> bool:
        """Returns whether no axis has been moved."""
        return self.order == tuple(range(len(self.order)))


def lazy(name: str, kernel: Kernel, uses: list[Use], dtype: Any = None) -> Lazy:
    """Returns a weight as it is before any operation."""
    order = tuple(range(len(kernel.stack) + len(kernel.shape)))
    return Lazy(name, kernel, order, dtype or kernel.dtype, uses)


def as_array(x: Any, operation: str) -> Any:
    """Returns a value as an array; of a lazy one it tells that this operation has decoded it."""
    if not isinstance(x, Lazy):
        return x
    x.used("decoded", operation)
    return x.array()


def bound(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Returns the results of one operation on arrays."""
    found = equation.primitive.get_bind_params(equation.params)
    # a pair with functions until jax 0.10
    functions, params = found if isinstance(found, tuple) else ((), found)
    with equation.ctx.manager:
        out = equation.primitive.bind(*functions, *inputs, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def is_stack(x: Lazy) -> bool:
    """Returns whether the first axis may be that of a stack."""
    return x.untouched() and (x.kernel.axes is None or bool(x.kernel.stack))


def layer_of(stack: Lazy, kernel: Kernel) -> Lazy:
    """Returns one layer of a stack.

    Args:
      stack: the stack.
      kernel: the layer's values, as parts of the stack's.
    """
    if kernel.axes is None:
        kernel = dataclasses.replace(kernel, shape=kernel.shape[1:])
    return lazy(stack.name, kernel, stack.uses, stack.dtype)
