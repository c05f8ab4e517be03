"""The reference: decode the weight, then one matrix product. Runs on every backend."""

import jax

from qlora_jax.kernels.dense import product
from qlora_jax.quant import QTensor, dequantize


def forward(x: jax.Array, q: QTensor) -> jax.Array:
    """x @ W: [..., K] to [..., N] in x's dtype, accumulated in float32."""
    return product(x, dequantize(q, x.dtype), 0).astype(x.dtype)


def backward(g: jax.Array, q: QTensor) -> jax.Array:
    """g @ W.T: [..., N] to [..., K] in g's dtype, accumulated in float32."""
    return product(g, dequantize(q, g.dtype), 1).astype(g.dtype)
