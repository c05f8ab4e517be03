"""The reference: decode the weight, then one matrix product. Runs on every backend."""

import jax
import jax.numpy as jnp

from qlora_jax.quant import QTensor, dequantize


def forward(x: jax.Array, q: QTensor) -> jax.Array:
    """x @ W: [..., K] to [..., N] in x's dtype, accumulated in float32."""
    return _product(x, dequantize(q, x.dtype), 0)


def backward(g: jax.Array, q: QTensor) -> jax.Array:
    """g @ W.T: [..., N] to [..., K] in g's dtype, accumulated in float32."""
    return _product(g, dequantize(q, g.dtype), 1)


def _product(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    dimensions = (((x.ndim - 1,), (contracted,)), ((), ()))
    y = jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
