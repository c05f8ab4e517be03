"""Describes which axes of a weight a product sums over, and converts a weight to matrices."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from qlora_jax.runtime.errors import UserError


class Axes(NamedTuple):
    """The axes of one layer's weight, sorted by their role in its product with an input.

    An adapter and a `QTensor` hold the weight as matrices [*batch, K, N]: K is the product of the
    sizes of `contract`, N that of `keep`. A stack of layers has additional leading axes, which are
    not counted here.

    Attributes:
      batch: axes that the input and the result also have, such as a layer's experts.
      contract: axes that the product sums over.
      keep: axes that the result has and the input does not have.
    """

    batch: tuple[int, ...]
    contract: tuple[int, ...]
    keep: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Returns all axes, in the order of the matrices."""
        return (*self.batch, *self.contract, *self.keep)

    def stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the leading axes, in front of the axes of one layer's weight."""
        return tuple(shape[: len(shape) - len(self.order)])

    def own(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of one layer's weight in a stack of this shape."""
        return tuple(shape[len(shape) - len(self.order) :])


MATRIX = Axes((), (0,), (1,))
"""Axes of W [K, N] in x @ W."""

TABLE = Axes((), (1,), (0,))
"""Axes of a table [N, K], such as an embedding: its rows are looked up, or used in x @ table.T."""


REGISTERED = "by qlora_jax.register_kernel"
"""How a user gives the axes of an NNX module's weight; part of error messages."""


def checked(axes: Axes, name: str, ndim: int, how: str = REGISTERED) -> Axes:
    """Checks that axes are those of a matrix product, and returns them.

    Args:
      axes: axes of the weight.
      name: path of the weight, for the error.
      ndim: number of axes of the weight, with those of a stack.
      how: way in which a user gives axes, for the error.

    Raises:
      UserError: an axis is missing, occurs twice or does not exist, or no axis is contracted or
        kept.
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
    """Returns the axes of a weight from an einsum of an input and this weight.

    Args:
      equation: einsum with the input first, such as "btd,dnh->btnh".
      name: path of the weight, for the error.
      how: way in which a user gives axes, for the error.

    Raises:
      UserError: the equation does not have two operands, or is no matrix product.
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
    """Converts a weight [*stack, *shape], of JAX or numpy, to matrices [*stack, *batch, K, N]."""
    stack, shape = axes.stack(weight.shape), axes.own(weight.shape)
    moved = weight.transpose(*range(len(stack)), *(len(stack) + i for i in axes.order))
    return moved.reshape(*stack, *matrices_shape(axes, shape))


def from_matrices(matrices: jax.Array, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
    """Converts matrices [*stack, *batch, K, N] to a weight [*stack, *shape]."""
    stack = matrices.shape[: matrices.ndim - 2 - len(axes.batch)]
    apart = matrices.reshape(*stack, *(shape[i] for i in axes.order))
    back = (len(stack) + int(i) for i in np.argsort(axes.order))
    return apart.transpose(*range(len(stack)), *back)


def all_matrices_shape(axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape (*stack, *batch, K, N) of the matrices of a weight [*stack, *shape]."""
    return (*axes.stack(shape), *matrices_shape(axes, axes.own(shape)))


def matrices_shape(axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape (*batch, K, N) of the matrices of one layer's weight."""
    sizes: Iterator[int] = (math.prod(shape[i] for i in part) for part in axes[1:])
    return (*(shape[i] for i in axes.batch), *sizes)
