"""Many adapters over one base: rows of a batch use different ones.

The low-rank products of a batch are gathered by row, as in S-LoRA and Punica (arXiv 2311.03285,
2310.18547). Which row uses which adapter is data, so programs that were compiled once serve any
mixture, and adapters come and go in slots of fixed shape.
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
    """The matrices and factors of a bank; never trained."""


class RowSlots(nnx.Variable):
    """Each row's slot in a bank, the same in every layer."""


class Bank(nnx.Module):
    """The updates of a stack of linears by `slots` adapters, and by none in a last slot of zeros.

    It stands where a linear's `Adapter` does.

    Attributes:
      a: [L, slots + 1, in, r], smaller ranks padded with zeros.
      b: [L, slots + 1, r, out].
      scale: float32[L, slots + 1].
      rows: int32[L, B], the slot of each row of the batch; `with_rows` sets it.
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
        """Each row's scale * (x @ A) @ B, x[B, T, in], in x's dtype; one layer of the stack.

        Rounded where `Adapter` rounds. Only the row's own matrices are read: what another slot
        holds, NaN included, does not reach it.
        """
        rows = self.rows.get_value()
        low = _by_row(x, self.a.get_value()[rows])
        low = (low * self.scale.get_value()[rows][:, None, None]).astype(x.dtype)
        return _by_row(low, self.b.get_value()[rows])

    def product(self, x: jax.Array, multiply: Multiply, key: jax.Array | None) -> jax.Array:
        """x times each row's adapted weight, [..., out] in x's dtype; one layer of the stack."""
        return multiply(x) + self(x, key)

    def put(self, slot: int, adapters: Sequence[LoraWeights | None]) -> None:
        """Writes an adapter into a slot, in place; what the slot held is gone.

        Args:
          slot: from 0.
          adapters: one per layer, of at most the bank's rank; None where a layer has none.
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
    """x[B, T, K] @ w[B, K, N], accumulated in float32, in x's dtype."""
    return jnp.einsum(
        "btk,bkn->btn", x, w.astype(x.dtype), preferred_element_type=jnp.float32
    ).astype(x.dtype)


def with_rows(weights: nnx.State, rows: jax.Array | np.ndarray) -> nnx.State:
    """The weights of a model with banks, set to compute row i of a batch by slot rows[i].

    Args:
      weights: from `nnx.split` of the model.
      rows: int32[B].
    """
    old, rest = nnx.split_state(weights, RowSlots, ...)
    set_rows = functools.partial(_broadcast, rows=jnp.asarray(rows, jnp.int32))
    return nnx.merge_state(jax.tree.map(set_rows, old), rest)


def _broadcast(old: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.broadcast_to(rows, (old.shape[0], *rows.shape))


@jax.jit
def _written(stack: jax.Array, value: np.ndarray, slot: int) -> jax.Array:
    return stack.at[:, slot].set(value.astype(stack.dtype))
