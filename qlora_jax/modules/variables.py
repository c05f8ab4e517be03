"""Defines the variable that replaces a module's parameter by a weight in 4 bits."""

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
"""Names of the attributes and methods of an array."""

FOUND = "kernel_found"
"""Metadata key for a `KnownVariable`; each `QWeight` has one, and variables after `discover`."""


class KnownVariable(NamedTuple):
    """Axes of one variable, used instead of the rules of its module's class.

    Attributes:
      axes: axes of one layer's weight; None if no product and no look-up uses the weight.
      table: True for a table whose rows are looked up.
    """

    axes: Axes | None
    table: bool


class ReplacedParam(NamedTuple):
    """Description of the parameter that a `QWeight` has replaced.

    Attributes:
      shape: shape of one layer's weight.
      dtype: name of the parameter's dtype.
      kind: class of the variable.
      metadata: metadata of the variable, such as its sharding.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: type[nnx.Variable]
    metadata: tuple[tuple[str, Any], ...]


class QWeight(nnx.Variable):
    """A frozen weight in 4 bits; not an `nnx.Param`, so gradients do not include it.

    The raw value is the QTensor of the weight's matrices. Code that reads the variable as an array
    gets the decoded weight.
    """

    @property
    def stands_for(self) -> ReplacedParam:
        """Returns the description of the parameter that this weight has replaced."""
        return self.get_metadata("stands_for")

    @property
    def kernel(self) -> Kernel:
        """Returns the weight as a kernel without adapters."""
        was, axes = self.stands_for, self.get_metadata(FOUND).axes
        return Kernel(self.get_raw_value(), {}, {}, axes, was.shape, jnp.dtype(was.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the replaced parameter, (*stack, *shape)."""
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
        """Returns the dtype of the replaced parameter."""
        return jnp.dtype(self.stands_for.dtype)

    def __getattr__(self, name: str) -> Any:
        # Code of the module may use any attribute or method of an array.
        return getattr(self.get_value(), name) if name in ARRAY else super().__getattr__(name)

    def get_value(self, **index: Any) -> jax.Array:
        """Returns the decoded weight; with `index=`, only weight[index]."""
        if (uses := recorded()) is not None and self.has_metadata(PATH):
            uses.append(Use(self.get_metadata(PATH), "decoded", "read"))
        value = self.get_raw_value()
        if not isinstance(value, QTensor) or not isinstance(value.codes, jax.Array | np.ndarray):
            return value  # not arrays: shapes, or results of a jax.tree.map
        weight = self.kernel.plain()
        return weight[index["index"]] if index else weight


def in_place_of(variable: nnx.Variable, q: QTensor, axes: Axes, table: bool) -> QWeight:
    """Makes the `QWeight` that replaces a parameter.

    Args:
      variable: parameter [*stack, *shape], an array or a shape.
      q: quantized matrices of the parameter [*stack, *batch, K, N].
      axes: axes of one layer's weight.
      table: True for a table whose rows are looked up.
    """
    value, metadata = variable.get_raw_value(), tuple(variable.get_metadata().items())
    was = ReplacedParam(axes.own(value.shape), value.dtype.name, type(variable), metadata)
    return QWeight(q, stands_for=was, kernel_found=KnownVariable(axes, table))


def restored(was: ReplacedParam, value: jax.Array) -> nnx.Variable:
    """Makes the replaced parameter again, with a new value."""
    return was.kind.from_metadata(value, dict(was.metadata))
