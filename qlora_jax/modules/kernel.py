"""Holds a weight of any module, as floats or in 4 bits, and computes its products and rows.

The weight has any number of axes. Its products are computed as matrix products by
`kernels.matmul`, `kernels.dense` and `lora.Adapter`, as in this project's own decoder.
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
      value: array [*stack, *shape], or QTensor of the weight's matrices [*stack, *batch, K, N].
      adapters: name to adapter: A [*stack, *batch, K, r], B [*stack, *batch, r, N] and scale.
      keys: name of an adapter to the keys of its dropout [*stack, *batch]; None drops nothing.
      axes: axes of one layer's weight; None if they are not known, and then there is no adapter.
      shape: shape of one layer's weight.
      dtype: dtype of the weight for the module's code.
    """

    value: jax.Array | QTensor
    adapters: Mapping[str, Adapter]
    keys: Mapping[str, jax.Array | None]
    axes: Axes | None
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """Returns the sizes of the leading axes, in front of the axes of one layer's weight."""
        own = 2 + len(self.known.batch) if isinstance(self.value, QTensor) else len(self.shape)
        return tuple(self.value.shape[: self.value.ndim - own])

    @property
    def known(self) -> Axes:
        """Returns `axes`; only for a weight with known axes: in 4 bits or with an adapter."""
        assert self.axes is not None
        return self.axes

    def product(self, x: jax.Array, base: jax.Array | None = None) -> jax.Array:
        """Returns x times the adapted weight, for each matrix of one layer's weight.

        Args:
          x: input, [*batch, rows, K].
          base: x @ W [*batch, rows, N], if the caller has it.

        Returns:
          Product [*batch, rows, N] in x's dtype.
        """
        value = self.value
        if not isinstance(value, QTensor):
            value = to_matrices(value, self.known)
        one = _product
        for _ in self.known.batch:
            one = jax.vmap(one)
        return one(value, dict(self.adapters), dict(self.keys), x, base)

    def rows(self, index: jax.Array, base: jax.Array | None = None) -> jax.Array:
        """Returns rows of one layer's table [N, K], with the adapters' parts.

        Args:
          index: int[m], indices of rows, from 0 to N - 1.
          base: these rows without the adapters' parts [m, K]; None only for a table in 4 bits.

        Returns:
          Rows [m, K] in `dtype`.
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
        """Returns the weight merged with its adapters, rounded once: dtype[*stack, *shape]."""
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
        # one matrix after the other, so that only one is in float32 at a time
        matrices = jax.lax.map(lambda x: _whole(x[0], x[1], self.dtype), flat)
        return from_matrices(matrices.reshape(*stack, *matrices.shape[1:]), self.known, self.shape)


def _product(
    value: jax.Array | QTensor,
    adapters: Mapping[str, Adapter],
    keys: Mapping[str, jax.Array | None],
    x: jax.Array,
    base: jax.Array | None,
) -> jax.Array:
    """Returns x [rows, K] times one matrix with its adapters: [rows, N]."""

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
    """Returns one matrix merged with its adapters, dtype[K, N]."""
    matrix = to_float32(value)
    for adapter in adapters.values():
        matrix = merged(matrix, adapter)
    return matrix.astype(dtype)


whole = jax.jit(Kernel.whole)
"""`Kernel.whole` under `jax.jit`: compiled once for all kernels of a shape."""


def of_array(value: Any, axes: Axes | None) -> Kernel:
    """Returns an array as a kernel without adapters; without axes, as the weight of one layer."""
    shape = tuple(value.shape) if axes is None else axes.own(value.shape)
    return Kernel(value, {}, {}, axes, shape, value.dtype)
