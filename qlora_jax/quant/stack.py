"""One matrix of a stack, given as the stack and an index; no copy is made until it is needed.

`jax.lax.scan` over a stack slices each layer's codes. XLA fuses the slice with the codes' user if
there is one user. With two users, as in a backward pass with rematerialization, XLA copies the
codes. A kernel that gets the whole stack and an index copies nothing.
"""

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.quant.qtensor import QTensor
from qlora_jax.quant.sharded import Sharded, whole


@nnx.register_data_type
@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack", "layer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QLayer:
    """A matrix W[K, N] in 4 bits, given as a stack and an index into it.

    Attributes:
      stack: stack of matrices, [L, K, N]; inside `jax.shard_map` it may be sharded.
      layer: index of the matrix, int32 scalar from 0 to L - 1; other values are clamped.
    """

    stack: QTensor | Sharded
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, (K, N)."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix."""
        return self.stack.ndim - 1

    def cut(self) -> QTensor:
        """Returns the matrix as a QTensor; a sharded matrix is gathered."""
        return whole(_cut_out(self.stack, self.layer))


Matrix = QTensor | QLayer | Sharded
"""A matrix in 4 bits: a QTensor, a layer of a stack, or a sharded matrix."""


def as_qtensor(q: Matrix) -> QTensor:
    """Returns a matrix as a QTensor: sliced from its stack, and gathered if it is sharded."""
    return q.cut() if isinstance(q, QLayer) else whole(q)


def is_matrix(x: Any) -> TypeGuard[Matrix]:
    """Returns whether a weight is in 4 bits, in any form of `Matrix`."""
    return isinstance(x, QLayer) or _is_q(x)


def is_sharded(q: Matrix) -> bool:
    """Returns whether a matrix is sharded."""
    return isinstance(q.stack if isinstance(q, QLayer) else q, Sharded)


def apart(weights: Any) -> tuple[Any, Any]:
    """Separates the QTensors of a tree of stacks from its arrays.

    A scan can then run over the arrays without slicing the QTensors.

    Returns:
      Two trees: the arrays, with None for each QTensor; and the QTensors, with None for each array.
    """
    rest = jax.tree.map(lambda x: None if _is_q(x) else x, weights, is_leaf=_is_q)
    return rest, jax.tree.map(lambda x: x if _is_q(x) else None, weights, is_leaf=_is_q)


def joined(rest: Any, stacks: Any, layer: jax.Array) -> Any:
    """Returns the tree of one layer, with each QTensor as a `QLayer`.

    Args:
      rest: arrays of one layer, from the first tree that `apart` returns.
      stacks: second tree that `apart` returns, with all layers.
      layer: index of the layer, int32 scalar.
    """

    def one(x: Any, q: QTensor | None) -> Any:
        return x if q is None else QLayer(q, layer)

    return jax.tree.map(one, rest, stacks, is_leaf=lambda x: x is None)


def layer_of(stacks: Any, layer: jax.Array) -> Any:
    """Returns one layer of a tree of stacks: QTensors as `QLayer`, arrays sliced.

    Args:
      stacks: arrays and QTensors [L, ...].
      layer: index of the layer, int32 scalar.
    """
    rest, whole = apart(stacks)
    return joined(_cut_out(rest, layer), whole, layer)


def _cut_out(stacks: Any, layer: jax.Array) -> Any:
    """Returns the arrays of one layer."""

    def one(stack: jax.Array) -> jax.Array:
        # XLA recognizes the loop index; the select that handles negative indices would hide it
        return jax.lax.dynamic_index_in_dim(
            stack, layer, keepdims=False, allow_negative_indices=False
        )

    return jax.tree.map(one, stacks)


def _is_q(x: Any) -> bool:
    return isinstance(x.part if isinstance(x, Sharded) else x, QTensor)


def empty_stack(
    value: jax.Array | QTensor, layers: int, shardings: Any = None
) -> jax.Array | QTensor:
    """Returns a stack of zeros for `layers` layers of the same shapes and dtypes.

    Args:
      value: one layer.
      layers: number of layers.
      shardings: shardings of the stack's leaves; None is the default device.
    """

    def zeros() -> Any:
        return jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), value)

    return zeros() if shardings is None else jax.jit(zeros, out_shardings=shardings)()


@functools.partial(jax.jit, donate_argnums=0)
def with_layer(
    stack: jax.Array | QTensor, value: jax.Array | QTensor, layer: int
) -> jax.Array | QTensor:
    """Returns a stack with one layer replaced; the result reuses the memory of `stack`."""
    return jax.tree.map(lambda s, v: s.at[layer].set(v), stack, value)
