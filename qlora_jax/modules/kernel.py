"""A weight of some module, as floats or in 4 bits, and what its products and rows are.

It has any number of axes. Its arithmetic is that of matrices: `kernels.matmul`, `kernels.dense` and
`lora.Adapter`, as in this project's own decoder.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.kernels import dense, matmul
from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.linear import merged
from qlora_jax.modules.axes import Axes, from_matrices, to_matrices
from qlora_jax.quant import QTensor, dequantize, to_float32
from qlora_jax.quant.columns import columns


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "adapters", "keys"],
    meta_fields=["axes", "shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight of one layer, or of a stack of layers, with its adapters.

    Attributes:
      value: [*stack, *shape], or the QTensor of its matrices [*stack, *batch, K, N].
      adapters: name to A [*stack, *batch, K, r], B [*stack, *batch, r, N] and scale.
      keys: name to the keys of an adapter's dropout [*stack, *batch]; None drops nothing.
      axes: what its axes are; None where that is not known, and it has no adapter.
      shape: shape of one layer's weight.
      dtype: dtype as which the module sees the weight.
    """

    value: jax.Array | QTensor
    adapters: Mapping[str, Adapter]
    keys: Mapping[str, jax.Array | None]
    axes: Axes | None
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns the sizes of the axes in front of a layer's own."""
        own = 2 + len(self.known.batch) if isinstance(self.value, QTensor) else len(self.shape)
        return tuple(self.value.shape[: self.value.ndim - own])

    @property
    def known(self) -> Axes:
        """Returns the axes of a weight that has an adapter or is in 4 bits."""
        assert self.axes is not None
        return self.axes

    def product(self, x: jax.Array, base: jax.Array | None = None) -> jax.Array:
        """Returns x times the adapted weight, matrix by matrix; one layer.

        Args:
          x: [*batch, rows, K].
          base: x times the weight without adapters [*batch, rows, N], where it is known.

        Returns:
          [*batch, rows, N] in x's dtype.
        """
        value = self.value
        if not isinstance(value, QTensor):
            value = to_matrices(value, self.known)
        one = _product
        for _ in self.known.batch:
            one = jax.vmap(one)
        return one(value, dict(self.adapters), dict(self.keys), x, base)

    def rows(self, index: jax.Array, base: jax.Array | None = None) -> jax.Array:
        """Returns some rows of a table: a weight whose one kept axis counts them; one layer.

        Args:
          index: int[m], from 0 to N - 1.
          base: these rows without what adapters add [m, K], where they are known.

        Returns:
          [m, K] in `dtype`.
        """
        if base is None:
            assert isinstance(self.value, QTensor)
            base = dequantize(columns(self.value, index), self.dtype).T
        for adapter in self.adapters.values():
            base = base + adapter.columns(index, self.dtype).T
        return base

    def plain(self) -> jax.Array:
        """Returns the weight without adapters, dtype[*stack, *shape]."""
        if not isinstance(self.value, QTensor):
            return self.value.astype(self.dtype)
        return from_matrices(dequantize(self.value, self.dtype), self.known, self.shape)

    def whole(self) -> jax.Array:
        """Returns the weight with what adapters add, rounded once: dtype[*stack, *shape]."""
        if not self.adapters:
            return self.plain()
        value = self.value
        if not isinstance(value, QTensor):
            value = to_matrices(value, self.known)
        lead = value.ndim - 2
        stack = value.shape[:lead]
        flat = jax.tree.map(
            lambda x: x.reshape(math.prod(stack), *x.shape[lead:]), (value, dict(self.adapters))
        )
        # one after the other: each is float32 for a moment
        matrices = jax.lax.map(lambda x: _whole(x[0], x[1], self.dtype), flat)
        return from_matrices(matrices.reshape(*stack, *matrices.shape[1:]), self.known, self.shape)


def _product(
    value: jax.Array | QTensor,
    adapters: Mapping[str, Adapter],
    keys: Mapping[str, jax.Array | None],
    x: jax.Array,
    base: jax.Array | None,
) -> jax.Array:
    """Returns x [rows, K] times one matrix and its adapters, [rows, N]."""

    def multiply(other: jax.Array) -> jax.Array:
        if base is not None and other is x:
            return base
        return matmul(other, value) if isinstance(value, QTensor) else dense(other, value)

    for name, adapter in adapters.items():
        multiply = functools.partial(adapter.product, multiply=multiply, key=keys.get(name))
    return multiply(x)


def _whole(
    value: jax.Array | QTensor, adapters: Mapping[str, Adapter], dtype: jnp.dtype
) -> jax.Array:
    """Returns one matrix with what its adapters add, dtype[K, N]."""
    matrix = to_float32(value)
    for adapter in adapters.values():
        matrix = merged(matrix, adapter)
    return matrix.astype(dtype)


whole = jax.jit(Kernel.whole)
"""`Kernel.whole`, compiled once for all kernels of a shape."""


def of_array(value: Any, axes: Axes | None) -> Kernel:
    """Returns an array as a kernel without adapters; without axes it is one layer's."""
    shape = tuple(value.shape) if axes is None else axes.own(value.shape)
    return Kernel(value, {}, {}, axes, shape, value.dtype)
