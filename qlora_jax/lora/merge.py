"""An adapter added to the weight it adapts: one product in place of three (LoRA, section 4.1)."""

import jax
import jax.numpy as jnp

from qlora_jax.lora.adapter import Adapter
from qlora_jax.quant import QTensor, dequantize


def delta(adapter: Adapter, layer: int) -> jax.Array:
    """What an adapter adds to the weight of one layer of its stack: scale * A @ B.

    Returns:
      float32[in, out].
    """
    a, b = (x.get_value()[layer].astype(jnp.float32) for x in (adapter.a, adapter.b))
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return adapter.scale.get_value()[layer] * product


def merged(
    weight: jax.Array | QTensor, change: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The weight with a change added, in float32 and rounded once.

    Args:
      weight: [in, out], floats or 4 bits.
      change: float32[in, out]; None adds nothing.
      dtype: of the result.

    Returns:
      dtype[in, out].
    """
    wide = dequantize(weight) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
    return (wide if change is None else wide + change).astype(dtype)
