"""A linear with a frozen weight and a trained low-rank update.

    y = x @ W + scale * (x @ A) @ B + bias                 (LoRA, section 4.1, equation 3)
    y = x @ dequantize(W) + scale * (x @ A) @ B + bias     (QLoRA, equations 3 and 5)

W [in, out] is the pretrained weight, in floats or in 4 bits (`QTensor`). W is frozen; A [in, r] and
B [r, out] are trained; scale = alpha / r (LoRA, section 4.1). B is zero at first, so y is then
x @ W + bias. A W in 4 bits is decoded for the forward product and again for the gradient of x; the
decoded W is not stored between the two.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.kernels import dense, matmul, matmul_many, saved_for_backward
from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.initializers.random_init import init_adapter
from qlora_jax.lora.spec import SCALINGS, AdapterSpec
from qlora_jax.lora.variables import Vector, Weight
from qlora_jax.quant import QTensor, to_float32
from qlora_jax.quant.stack import is_matrix


class LoraLinear(nnx.Module):
    """A linear: x @ W + bias, plus the update of its adapter if it has one.

    All arrays may have a leading axis, the layers of a stack. `jax.lax.scan` or `jax.vmap` removes
    this axis before a product.

    Attributes:
      weight: W, [in, out] or [L, in, out], an array or a QTensor.
      bias: bias, [out] or [L, out]; or None.
      adapter: A, B and scale; None for a linear without an adapter.
      implementation: kernel of `matmul` for a 4-bit weight; None picks by device, dtype and rows.
    """

    def __init__(self, weight: jax.Array | QTensor, bias: jax.Array | None = None):
        self.weight = Weight(weight)
        self.bias = None if bias is None else Vector(bias)
        self.adapter: Adapter | None = None
        self.implementation: str | None = None

    @classmethod
    def from_weight(
        cls,
        weight: jax.Array | QTensor,
        bias: jax.Array | None = None,
        *,
        key: jax.Array,
        rank: int = 16,
        alpha: float = 32.0,
        scaling: str = "alpha/r",
        init: str = "kaiming-uniform",
        dropout: float = 0.0,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "LoraLinear":
        """Returns a linear with a pretrained weight and a new adapter.

        Args:
          weight: W, [in, out] or [L, in, out], an array or a QTensor.
          bias: bias, [out] or [L, out]; or None.
          key: random key from which A is drawn.
          rank: rank r of A and B.
          alpha: numerator of the scale.
          scaling: key of `spec.SCALINGS`.
          init: distribution of A, a key of `initializers.random_init.INITS`.
          dropout: dropout rate on the input of A, in training.
          dtype: dtype of A and B.
        """
        *stack, k, n = weight.shape
        spec = AdapterSpec(rank, alpha, SCALINGS[scaling](alpha, rank))
        layers = [spec] * (stack[0] if stack else 1)
        adapter = init_adapter(key, layers, k, n, init, dropout, dtype)
        if not stack:
            adapter.unstack()
        linear = cls(weight, bias)
        linear.adapter = nnx.data(adapter)
        return linear

    def __call__(
        self, x: jax.Array, key: jax.Array | None = None, known: jax.Array | None = None
    ) -> jax.Array:
        """Returns y of one layer, [..., out] in x's dtype.

        Args:
          x: input, [..., in].
          key: key for dropout; None drops nothing.
          known: x @ W, [..., out], if the caller has computed it already; else None.
        """

        def multiply(other: jax.Array) -> jax.Array:
            return known if known is not None and other is x else self.multiply(other)

        y = multiply(x) if self.adapter is None else self.adapter.product(x, multiply, key)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(x.dtype)
        return saved_for_backward(y)

    def multiply(self, x: jax.Array) -> jax.Array:
        """Returns x @ W of one layer, without bias and adapter, [..., out] in x's dtype."""
        weight = self.weight.get_value()
        if is_matrix(weight):
            return matmul(x, weight, self.implementation)
        return dense(x, weight)

    def merge(self, *layer: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Returns one layer's W plus its adapter's update (LoRA: scale * A @ B), dtype[in, out].

        A merged weight needs one product instead of three (LoRA, section 4.1).

        Args:
          layer: index in the stack; omitted if there is no stack.
          dtype: dtype of the result.
        """
        return merged(self.weight.get_value()[layer], self.adapter, *layer, dtype=dtype)


def side_by_side(
    linears: Sequence[LoraLinear], x: jax.Array, keys: Sequence[jax.Array | None]
) -> list[jax.Array]:
    """Returns linear(x, key) for each linear.

    If all weights are in 4 bits and all linears have the same `implementation`, `matmul_many`
    computes the products x @ W together.

    Args:
      linears: linears of one layer that have the same input.
      x: input, [..., in].
      keys: key for dropout of each linear, or None.
    """
    weights = [linear.weight.get_value() for linear in linears]
    implementation, *others = {linear.implementation for linear in linears}
    if len(linears) == 1 or others or not all(map(is_matrix, weights)):
        return [linear(x, key) for linear, key in zip(linears, keys)]
    products = matmul_many(x, weights, implementation)
    return [linear(x, key, y) for linear, key, y in zip(linears, keys, products)]


def merged(
    weight: jax.Array | QTensor,
    adapter: Adapter | None,
    *layer: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns a layer's weight plus its adapter's update, summed in float32 and rounded once.

    Args:
      weight: W of the layer, [in, out], floats or 4 bits.
      adapter: adapter of the layer or of its stack; None adds nothing.
      layer: index in the stack; omitted if there is no stack.
      dtype: dtype of the result.

    Returns:
      Merged weight, dtype[in, out].
    """
    plain = to_float32(weight)
    return (plain if adapter is None else plain + adapter.weight_update(plain, *layer)).astype(
        dtype
    )
