"""Which axes of a weight a product sums over, and the same weight as matrices."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from qlora_jax.runtime.errors import UserError


class Axes(NamedTuple):
    """The axes of one layer's weight by their part in its product with an input.

    An adapter and a `QTensor` hold the weight as matrices [*batch, K, N]: K is all of `contract`,
    N all of `keep`. A stack of layers has more axes, in front of these; they are not counted here.

    Attributes:
      batch: those that the input and the result have as well, such as a layer's experts.
      contract: those that are summed over.
      keep: those that the result has.
    """

    batch: tuple[int, ...]
    contract: tuple[int, ...]
    keep: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Returns all axes, in the order of the matrices."""
        return (*self.batch, *self.contract, *self.keep)

    def stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the axes in front of a layer's own."""
        return tuple(shape[: len(shape) - len(self.order)])

    def own(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of one layer's weight in a stack of this shape."""
        return tuple(shape[len(shape) - len(self.order) :])


MATRIX = Axes((), (0,), (1,))
"""Those of W[K, N] in x @ W."""

TABLE = Axes((), (1,), (0,))
"""Those of a table [N, K] of N rows, which are looked up, or multiplied as x @ table.T."""


REGISTERED = "by qlora_jax.register_kernel"
"""How axes are told of an NNX module's weight, for errors."""


def checked(axes: Axes, name: str, ndim: int, how: str = REGISTERED) -> Axes:
    """Returns the axes if they are those of a matrix product.

    Args:
      axes: the axes, of which each must be one of the weight's.
      name: the weight's path, for the error.
      ndim: number of the weight's axes, its stack's included.
      how: how axes are told, for the error.

    Raises:
      UserError: they are not.
    """
    order = sorted(axes.order)
    if order == list(range(len(order))) and axes.contract and axes.keep and len(order) <= ndim:
        return axes
    raise UserError(
        f"{name}: batch {axes.batch}, contracted {axes.contract} and kept {axes.keep} axes are no "
        f"matrix product with a weight of {ndim} axes; give each axis once, and at least one to "
        f"sum over and one to keep, {how}"
    )


def from_equation(equation: str, name: str, how: str = REGISTERED) -> Axes:
    """Reads an einsum of an input and a weight, in this order, such as "btd,dnh->btnh".

    Args:
      equation: the einsum.
      name: the weight's path, for the error.
      how: how axes are told, for the error.

    Raises:
      UserError: the equation has other than two operands, or is no matrix product.
    """
    inputs, arrow, result = equation.replace(" ", "").replace("...", "").partition("->")
    x, comma, weight = inputs.partition(",")
    if not arrow or not comma or "," in weight or len(set(weight)) < len(weight):
        raise UserError(
            f"{name}: {equation!r} is no einsum of an input and a weight; give one such as "
            f"'...k,kn->...n' {how}"
        )

    def where(in_x: bool, in_result: bool) -> tuple[int, ...]:
        found = enumerate(weight)
        return tuple(i for i, c in found if (c in x, c in result) == (in_x, in_result))

    axes = Axes(where(True, True), where(True, False), where(False, True))
    return checked(axes, name, len(weight), how)


def to_matrices(weight: Any, axes: Axes) -> Any:
    """Returns a weight [*stack, *shape], of JAX or numpy, as matrices [*stack, *batch, K, N]."""
    stack, shape = axes.stack(weight.shape), axes.own(weight.shape)
    moved = weight.transpose(*range(len(stack)), *(len(stack) + i for i in axes.order))
    return moved.reshape(*stack, *matrices_shape(axes, shape))


def from_matrices(matrices: jax.Array, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
    """Returns matrices [*stack, *batch, K, N] as a weight [*stack, *shape]."""
    stack = matrices.shape[: matrices.ndim - 2 - len(axes.batch)]
    apart = matrices.reshape(*stack, *(shape[i] for i in axes.order))
    back = (len(stack) + int(i) for i in np.argsort(axes.order))
    return apart.transpose(*range(len(stack)), *back)


def all_matrices_shape(axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns (*stack, *batch, K, N) of a weight [*stack, *shape]."""
    return (*axes.stack(shape), *matrices_shape(axes, axes.own(shape)))


def matrices_shape(axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns (*batch, K, N) of one layer's weight of a shape."""
    sizes: Iterator[int] = (math.prod(shape[i] for i in part) for part in axes[1:])
    return (*(shape[i] for i in axes.batch), *sizes)
