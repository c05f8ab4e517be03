"""The low-rank update of a linear: A, B and scale, and what they add to a product."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.kernels import dense, saved_for_backward
from qlora_jax.lora import dropout
from qlora_jax.lora.dropout import DropoutKeys
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.variables import LoraB, LoraConstant, LoraParam, LoraScale
from qlora_jax.lora.weights import LoraWeights

Multiply = Callable[[jax.Array], jax.Array]
"""x [..., in] to x @ W [..., out] in x's dtype, W being one layer's pretrained weight."""


class Adapter(nnx.Module):
    """Adds scale * (x @ A) @ B to x @ W (LoRA, section 4.1).

    The arrays may have a leading axis, that of a stack of L layers, which `jax.lax.scan` or
    `jax.vmap` takes away before a product. In a stack, a layer of smaller rank than the largest is
    padded with zeros in both matrices, whose gradients are then exactly zero; a layer without an
    adapter has rank 0 and scale 0.

    Attributes:
      a: [in, r] or [L, in, r].
      b: [r, out] or [L, r, out].
      scale: float32 scalar or [L].
      specs: rank, alpha and scale of each layer, or of the only one; None where a layer has none.
      dropout: rate on the input of A.
      freeze_a: whether A stays as it is (LoRA-FA, arXiv 2308.03303).
      keys: where the keys for dropout come from, if the adapter has them itself; else None.
    """

    def __init__(
        self,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array,
        specs: Sequence[AdapterSpec | None],
        dropout: float = 0.0,
        freeze_a: bool = False,
    ):
        self.a = LoraConstant(a) if freeze_a else LoraParam(a)
        self.b = LoraB(b)
        self.scale = LoraScale(scale)
        self.specs = tuple(specs)
        self.dropout = dropout
        self.freeze_a = freeze_a
        self.keys: DropoutKeys | None = None

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns scale * (x @ A) @ B in x's dtype; one layer. Dropout needs a key."""
        return dense(self.low(x, key), self.b.get_value())

    def low(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns scale * x @ A [..., r] in x's dtype; one layer.

        Dropout needs a key, or a key [B] for each place of x's first axis.
        """
        if self.dropout and key is not None:
            keep = 1 - self.dropout
            x = jnp.where(dropout.keep_mask(key, keep, x.shape), x / keep, 0).astype(x.dtype)
        low = dense(x, self.a.get_value()) * self.scale.get_value()
        return saved_for_backward(low.astype(x.dtype))

    def looked_up(self, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns scale * A[tokens] @ B: what the adapter of an embedding adds to its rows.

        It is `__call__` for rows of the identity matrix, without dropout, as in PEFT.

        Args:
          tokens: int32[...], rows of A.
          dtype: dtype of the result.

        Returns:
          dtype[..., out].
        """
        # in float32, so that the gradients of a token's places add up in it
        rows = self.a.get_value().astype(jnp.float32)[tokens]
        return dense((rows * self.scale.get_value()).astype(dtype), self.b.get_value())

    def columns(self, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns scale * A @ B[:, index]: what the adapter adds to some columns of the weight.

        Args:
          index: int32[m], columns of B.
          dtype: dtype of the result.

        Returns:
          dtype[in, m].
        """
        # in float32, so that the gradients of a column's places add up in it
        chosen = self.b.get_value().astype(jnp.float32)[:, index]
        a = (self.a.get_value() * self.scale.get_value()).astype(dtype)
        return dense(a, chosen.astype(dtype))

    def product(self, x: jax.Array, multiply: Multiply, key: jax.Array | None) -> jax.Array:
        """Returns x times the adapted weight, [..., out] in x's dtype; one layer."""
        return multiply(x) + self(x, key)

    def next_key(self) -> jax.Array | None:
        """Returns the keys for the dropout of one call [*stack, 2]; None drops nothing."""
        return None if self.keys is None else self.keys.draw()

    def sizes(self) -> tuple[int, int]:
        """Returns (trained, all) parameters of all layers, padding not counted."""
        k, n = self.a.get_value().shape[-2], self.b.get_value().shape[-1]
        ranks = sum(spec.rank for spec in self.specs if spec is not None)
        return ranks * (n if self.freeze_a else k + n), ranks * (k + n)

    def weights(self, *layer: int) -> LoraWeights | None:
        """Returns one layer's values without padding; None where it has no adapter.

        Args:
          layer: its index in the stack; nothing where there is no stack.
        """
        spec = self.spec(*layer)
        if spec is None:
            return None
        a, b = self.a.get_value()[layer][:, : spec.rank], self.b.get_value()[layer][: spec.rank]
        return LoraWeights(np.asarray(a), np.asarray(b), spec.alpha, spec.scale)

    def spec(self, *layer: int) -> AdapterSpec | None:
        """Returns the rank, alpha and scale of one layer, indexed as `weights` does."""
        return self.specs[layer[0] if layer else 0]

    def change(self, weight: jax.Array, *layer: int) -> jax.Array:
        """Returns what the adapter adds to a layer's weight: scale * A @ B.

        Args:
          weight: W float32[in, out].
          layer: indexed as `weights` does.

        Returns:
          float32[in, out].
        """
        a, b = (x.get_value()[layer].astype(jnp.float32) for x in (self.a, self.b))
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return self.scale.get_value()[layer] * product

    def fill(self, values: Sequence[LoraWeights | None]) -> None:
        """Replaces each layer's A and B, in place; None leaves a layer as it is."""
        a, b = np.array(self.a.get_value()), np.array(self.b.get_value())
        for i, value in enumerate(values):
            if value is not None:
                a[i, :, : value.rank], b[i, : value.rank] = value.a, value.b
        self.a.set_value(jnp.asarray(a))
        self.b.set_value(jnp.asarray(b))

    def unstack(self) -> None:
        """Takes the axis of a stack of one layer away, in place."""
        for variable in (self.a, self.b, self.scale):
            variable.set_value(variable.get_value()[0])

    def fill_own(self, values: Sequence[LoraWeights | None]) -> None:
        """Takes over, in place, what each layer's values hold beyond A and B."""
