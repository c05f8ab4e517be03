"""A module's weight in 4 bits, in the place of its parameter."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.modules.axes import Axes
from qlora_jax.modules.kernel import Kernel
from qlora_jax.modules.uses import PATH, Use, recorded
from qlora_jax.quant import QTensor

ARRAY = frozenset(name for name in dir(jax.Array) if not name.startswith("_"))
"""Attributes and methods of an array."""

FOUND = "kernel_found"
"""The key of a variable's metadata that holds a `KnownVariable`: a `QWeight`'s, or from `discover`."""


class KnownVariable(NamedTuple):
    """What is known of a variable itself, whatever its class says.

    Attributes:
      axes: what the axes of one layer's weight are; None if no product has it.
      table: whether it is a table that is looked up.
    """

    axes: Axes | None
    table: bool


class StandsFor(NamedTuple):
    """The parameter that a `QWeight` has taken the place of.

    Attributes:
      shape: shape of one layer's weight.
      dtype: name of its dtype.
      kind: class of the variable.
      metadata: its metadata, such as its sharding.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: type[nnx.Variable]
    metadata: tuple[tuple[str, Any], ...]


class QWeight(nnx.Variable):
    """A frozen weight in 4 bits: no `nnx.Param`, so no gradient is taken of its codes.

    Its raw value is the QTensor of the weight's matrices. Code that reads the variable as an array
    gets one that is decoded.
    """

    @property
    def stands_for(self) -> StandsFor:
        """What this has taken the place of."""
        return self.get_metadata("stands_for")

    @property
    def kernel(self) -> Kernel:
        """The weight without adapters."""
        was, axes = self.stands_for, self.get_metadata(FOUND).axes
        return Kernel(self.get_raw_value(), {}, {}, axes, was.shape, jnp.dtype(was.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that this stands for."""
        kernel = self.kernel
        return (*kernel.stack, *kernel.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the parameter that this stands for."""
        return jnp.dtype(self.stands_for.dtype)

    def __getattr__(self, name: str) -> Any:
        # what code elsewhere reads of an array it finds here
        return getattr(self.get_value(), name) if name in ARRAY else super().__getattr__(name)

    def get_value(self, **index: Any) -> jax.Array:
        """Returns the weight, decoded; with `index=`, that part of it."""
        if (uses := recorded()) is not None and self.has_metadata(PATH):
            uses.append(Use(self.get_metadata(PATH), "decoded", "read"))
        value = self.get_raw_value()
        if not isinstance(value, QTensor) or not isinstance(value.codes, jax.Array | np.ndarray):
            return value  # of shapes, or of what a caller has mapped the arrays to
        weight = self.kernel.plain()
        return weight[index["index"]] if index else weight


def in_place_of(variable: nnx.Variable, q: QTensor, axes: Axes, table: bool) -> QWeight:
    """Returns a QTensor as a variable that takes the place of a parameter.

    Args:
      variable: the parameter [*stack, *shape], of arrays or of their shapes.
      q: its matrices [*stack, *batch, K, N].
      axes: what the axes of one layer's weight are.
      table: whether it is a table that is looked up.
    """
    value, metadata = variable.get_raw_value(), tuple(variable.get_metadata().items())
    was = StandsFor(axes.own(value.shape), value.dtype.name, type(variable), metadata)
    return QWeight(q, stands_for=was, kernel_found=KnownVariable(axes, table))


def restored(was: StandsFor, value: jax.Array) -> nnx.Variable:
    """Returns a parameter as it was before, with this value."""
    return was.kind.from_metadata(value, dict(was.metadata))
