"""Many adapters over one base: each row of a batch can use another adapter.

Each row gathers its own A and B, as in S-LoRA and Punica (arXiv 2311.03285, 2310.18547). The choice
of adapter per row is data, so a compiled program serves any mixture of adapters. An adapter is
added by writing it into a slot of fixed shape, without a new compilation.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora.adapter import Multiply
from qlora_jax.lora.weights import LoraWeights


class BankMatrix(nnx.Variable):
    """The A, B and scale arrays of a bank; they are never trained."""


class RowSlots(nnx.Variable):
    """The slot of each row of the batch; it is the same in every layer."""


class Bank(nnx.Module):
    """The adapters of a stack of linears: `slots` adapters and one extra slot of zeros.

    The extra last slot is for rows that use the base without an adapter. A bank takes the place of
    a linear's `Adapter`.

    Attributes:
      a: A of each slot, [L, slots + 1, in, r]; smaller ranks are padded with zeros.
      b: B of each slot, [L, slots + 1, r, out].
      scale: scale of each slot, float32[L, slots + 1].
      rows: slot of each row of the batch, int32[L, B]; `with_rows` sets it.
    """

    def __init__(
        self,
        layers: int,
        in_features: int,
        out_features: int,
        slots: int,
        rank: int,
        dtype: jax.typing.DTypeLike,
    ):
        self.a = BankMatrix(jnp.zeros((layers, slots + 1, in_features, rank), dtype))
        self.b = BankMatrix(jnp.zeros((layers, slots + 1, rank, out_features), dtype))
        self.scale = BankMatrix(jnp.zeros((layers, slots + 1), jnp.float32))
        self.rows = RowSlots(jnp.full((layers, 1), slots, jnp.int32))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns scale * (x @ A) @ B with the adapter of each row, for one layer of the stack.

        Values are rounded at the same points as in `Adapter`. A row reads only the matrices of its
        own slot, so values of other slots, even NaN, cannot affect it.

        Args:
          x: input, [B, T, in].
          key: unused; a bank has no dropout.

        Returns:
          Update, [B, T, out] in x's dtype.
        """
        rows = self.rows.get_value()
        low = _by_row(x, self.a.get_value()[rows])
        low = (low * self.scale.get_value()[rows][:, None, None]).astype(x.dtype)
        return _by_row(low, self.b.get_value()[rows])

    def product(self, x: jax.Array, multiply: Multiply, key: jax.Array | None) -> jax.Array:
        """Returns x @ W of one layer plus each row's update, [..., out] in x's dtype."""
        return multiply(x) + self(x, key)

    def put(self, slot: int, adapters: Sequence[LoraWeights | None]) -> None:
        """Writes an adapter into a slot, in place, and overwrites the previous one.

        Args:
          slot: number of the slot, from 0.
          adapters: adapter of each layer, of at most the bank's rank; None for a layer without one.
        """
        layers, _, k, rank = self.a.get_value().shape
        a = np.zeros((layers, k, rank), np.float32)
        b = np.zeros((layers, rank, self.b.get_value().shape[-1]), np.float32)
        scale = np.zeros(layers, np.float32)
        for i, own in enumerate(adapters):
            if own is not None:
                a[i, :, : own.rank], b[i, : own.rank], scale[i] = own.a, own.b, own.scale
        for variable, value in ((self.a, a), (self.b, b), (self.scale, scale)):
            variable.set_value(_written(variable.get_value(), value, slot))


def _by_row(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns x[B, T, K] @ w[B, K, N] in x's dtype, accumulated in float32."""
    return jnp.einsum(
        "btk,bkn->btn", x, w.astype(x.dtype), preferred_element_type=jnp.float32
    ).astype(x.dtype)


def with_rows(weights: nnx.State, rows: jax.Array | np.ndarray) -> nnx.State:
    """Returns the weights of a model with banks, in which row i of a batch uses slot rows[i].

    Args:
      weights: state of the model, from `nnx.split`.
      rows: slot of each row, int32[B].
    """
    old, rest = nnx.split_state(weights, RowSlots, ...)
    set_rows = functools.partial(_broadcast, rows=jnp.asarray(rows, jnp.int32))
    return nnx.merge_state(jax.tree.map(set_rows, old), rest)


def _broadcast(old: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.broadcast_to(rows, (old.shape[0], *rows.shape))


@jax.jit
def _written(stack: jax.Array, value: np.ndarray, slot: int) -> jax.Array:
    return stack.at[:, slot].set(value.astype(stack.dtype))
