"""One matrix of a stack, by its place: nothing is cut out of the stack until someone needs it.

`jax.lax.scan` over a stack cuts each layer's codes out of it. XLA fuses that with one use of the
codes. For two, as in a backward pass that computes the forward pass again, it copies them. A
kernel that gets the stack and a place copies nothing.
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
    """A matrix W[K, N] in 4 bits, as a stack of such and a place in it.

    Attributes:
      stack: [L, K, N]; inside `jax.shard_map` it may be in parts.
      layer: int32 scalar from 0 to L - 1; a value beyond is taken as the nearest of these.
    """

    stack: QTensor | Sharded
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, (K, N)."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stack.ndim - 1

    def cut(self) -> QTensor:
        """Returns the matrix alone, gathered if it is in parts."""
        return whole(_cut_out(self.stack, self.layer))


Matrix = QTensor | QLayer | Sharded
"""A matrix in 4 bits: by itself, by its place in a stack, or in parts."""


def cut(q: Matrix) -> QTensor:
    """Returns a matrix as a QTensor of its own, gathered if it is in parts."""
    return q.cut() if isinstance(q, QLayer) else whole(q)


def is_matrix(x: Any) -> TypeGuard[Matrix]:
    """Whether a weight is in 4 bits, in whichever of these forms."""
    return isinstance(x, QLayer) or _is_q(x)


def is_sharded(q: Matrix) -> bool:
    """Whether a matrix is in parts."""
    return isinstance(q.stack if isinstance(q, QLayer) else q, Sharded)


def apart(weights: Any) -> tuple[Any, Any]:
    """Takes the QTensors out of a tree of stacks, so that a scan over the rest leaves them whole.

    Returns:
      Two trees, the rest and the QTensors, each with None where the other has something.
    """
    rest = jax.tree.map(lambda x: None if _is_q(x) else x, weights, is_leaf=_is_q)
    return rest, jax.tree.map(lambda x: x if _is_q(x) else None, weights, is_leaf=_is_q)


def joined(rest: Any, stacks: Any, layer: jax.Array) -> Any:
    """Returns one layer's tree, each QTensor as a `QLayer`.

    Args:
      rest, stacks: from `apart`, of `rest` one layer.
      layer: int32 scalar.
    """

    def one(x: Any, q: QTensor | None) -> Any:
        return x if q is None else QLayer(q, layer)

    return jax.tree.map(one, rest, stacks, is_leaf=lambda x: x is None)


def layer_of(stacks: Any, layer: jax.Array) -> Any:
    """Returns one layer of a tree of stacks, each QTensor as a `QLayer` and the rest cut out.

    Args:
      stacks: arrays and QTensors [L, ...].
      layer: int32 scalar.
    """
    rest, whole = apart(stacks)
    return joined(_cut_out(rest, layer), whole, layer)


def _cut_out(stacks: Any, layer: jax.Array) -> Any:
    """Returns the arrays of one layer."""

    def one(stack: jax.Array) -> jax.Array:
        # XLA reads the place from the loop; a select for negative ones would hide it
        return jax.lax.dynamic_index_in_dim(
            stack, layer, keepdims=False, allow_negative_indices=False
        )

    return jax.tree.map(one, stacks)


def _is_q(x: Any) -> bool:
    return isinstance(x.part if isinstance(x, Sharded) else x, QTensor)


def empty_stack(
    value: jax.Array | QTensor, layers: int, shardings: Any = None
) -> jax.Array | QTensor:
    """Returns a stack of zeros for as many layers like this one.

    Args:
      value: one layer.
      layers: length of the stack.
      shardings: where the stack's leaves live; None is the default device.
    """

    def zeros() -> Any:
        return jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), value)

    return zeros() if shardings is None else jax.jit(zeros, out_shardings=shardings)()


@functools.partial(jax.jit, donate_argnums=0)
def with_layer(
    stack: jax.Array | QTensor, value: jax.Array | QTensor, layer: int
) -> jax.Array | QTensor:
    """Returns a stack with one layer replaced, in the memory of the stack that is given."""
    return jax.tree.map(lambda s, v: s.at[layer].set(v), stack, value)
