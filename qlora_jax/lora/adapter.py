"""The adapter of a linear: A, B and scale, and the product scale * (x @ A) @ B."""

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
"""Function from x [..., in] to x @ W [..., out] in x's dtype; W is a layer's pretrained weight."""


class Adapter(nnx.Module):
    """The low-rank update scale * (x @ A) @ B of a product x @ W (LoRA, section 4.1, equation 3).

    The arrays may have a leading axis, the layers of a stack. `jax.lax.scan` or `jax.vmap` removes
    this axis before a product. In a stack, A and B of a layer with a smaller rank than the largest
    are padded with zeros; the gradients of the padding are exactly zero. A layer without an adapter
    has rank 0 and scale 0.

    Attributes:
      a: A, [in, r] or [L, in, r].
      b: B, [r, out] or [L, r, out].
      scale: factor on the product, float32 scalar or [L].
      specs: rank, alpha and scale of each layer; None for a layer without an adapter. Without a
        stack there is one entry.
      dropout: dropout rate on the input of A.
      freeze_a: True keeps A constant, so A is not trained (LoRA-FA, arXiv 2308.03303).
      keys: source of the dropout keys if the adapter draws its own keys; else None.
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
        """Returns scale * (x @ A) @ B of one layer, in x's dtype; without a key no dropout."""
        return dense(self.project_down(x, key), self.b.get_value())

    def project_down(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns scale * (x @ A) of one layer, [..., r] in x's dtype.

        Args:
          x: input, [..., in].
          key: key for dropout, or one key [B] per row of x's first axis; None drops nothing.
        """
        if self.dropout and key is not None:
            keep = 1 - self.dropout
            x = jnp.where(dropout.keep_mask(key, keep, x.shape), x / keep, 0).astype(x.dtype)
        low = dense(x, self.a.get_value()) * self.scale.get_value()
        return saved_for_backward(low.astype(x.dtype))

    def looked_up(self, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns scale * A[tokens] @ B, the update of an embedding's rows.

        The result equals `__call__` on one-hot rows without dropout, as in PEFT.

        Args:
          tokens: token ids (rows of A), int32[...].
          dtype: dtype of the result.

        Returns:
          Update of the rows, dtype[..., out].
        """
        # float32, because the gradients of a token that occurs several times are summed in it
        rows = self.a.get_value().astype(jnp.float32)[tokens]
        return dense((rows * self.scale.get_value()).astype(dtype), self.b.get_value())

    def columns(self, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns scale * A @ B[:, index], the update of some columns of the weight.

        Args:
          index: column numbers of B, int32[m].
          dtype: dtype of the result.

        Returns:
          Update of the columns, dtype[in, m].
        """
        # float32, because the gradients of a column that occurs several times are summed in it
        chosen = self.b.get_value().astype(jnp.float32)[:, index]
        a = (self.a.get_value() * self.scale.get_value()).astype(dtype)
        return dense(a, chosen.astype(dtype))

    def product(self, x: jax.Array, multiply: Multiply, key: jax.Array | None) -> jax.Array:
        """Returns x @ W + scale * (x @ A) @ B of one layer, [..., out] in x's dtype."""
        return multiply(x) + self(x, key)

    def next_key(self) -> jax.Array | None:
        """Returns the dropout keys of one call, [*stack, 2]; None if nothing is dropped."""
        return None if self.keys is None else self.keys.draw()

    def sizes(self) -> tuple[int, int]:
        """Returns (trained, all) parameter counts over all layers, without padding."""
        k, n = self.a.get_value().shape[-2], self.b.get_value().shape[-1]
        ranks = sum(spec.rank for spec in self.specs if spec is not None)
        return ranks * (n if self.freeze_a else k + n), ranks * (k + n)

    def weights(self, *layer: int) -> LoraWeights | None:
        """Returns the adapter of one layer without padding; None if the layer has no adapter.

        Args:
          layer: index in the stack; omitted if there is no stack.
        """
        spec = self.spec(*layer)
        if spec is None:
            return None
        a, b = self.a.get_value()[layer][:, : spec.rank], self.b.get_value()[layer][: spec.rank]
        return LoraWeights(np.asarray(a), np.asarray(b), spec.alpha, spec.scale)

    def spec(self, *layer: int) -> AdapterSpec | None:
        """Returns the rank, alpha and scale of one layer; `layer` is as in `weights`."""
        return self.specs[layer[0] if layer else 0]

    def weight_update(self, weight: jax.Array, *layer: int) -> jax.Array:
        """Returns scale * A @ B, the update of a layer's weight.

        Args:
          weight: W, float32[in, out]; some variants need it.
          layer: index in the stack; omitted if there is no stack.

        Returns:
          Update, float32[in, out].
        """
        a, b = (x.get_value()[layer].astype(jnp.float32) for x in (self.a, self.b))
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return self.scale.get_value()[layer] * product

    def fill(self, values: Sequence[LoraWeights | None]) -> None:
        """Replaces A and B of each layer, in place; None leaves a layer unchanged."""
        a, b = np.array(self.a.get_value()), np.array(self.b.get_value())
        for i, value in enumerate(values):
            if value is not None:
                a[i, :, : value.rank], b[i, : value.rank] = value.a, value.b
        self.a.set_value(jnp.asarray(a))
        self.b.set_value(jnp.asarray(b))

    def unstack(self) -> None:
        """Removes the leading axis of a stack of one layer, in place."""
        for variable in (self.a, self.b, self.scale):
            variable.set_value(variable.get_value()[0])

    def fill_own(self, values: Sequence[LoraWeights | None]) -> None:
        """Copies a variant's own parameters (such as DoRA's magnitude) from `values`, in place."""
