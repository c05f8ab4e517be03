"""An adapter added to the weight it adapts: one product in place of three (LoRA, section 4.1)."""

import jax
import jax.numpy as jnp

from qlora_jax.lora.adapter import Adapter
from qlora_jax.quant import QTensor, dequantize


def merged(
    weight: jax.Array | QTensor,
    adapter: Adapter | None,
    layer: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """One layer's weight with what its adapter adds, in float32 and rounded once.

    Args:
      weight: [in, out], floats or 4 bits.
      adapter: of the layer's stack; None adds nothing.
      layer: index in the stack.
      dtype: of the result.

    Returns:
      dtype[in, out].
    """
    plain = wide(weight)
    return (plain if adapter is None else plain + adapter.change(layer, plain)).astype(dtype)


def wide(weight: jax.Array | QTensor) -> jax.Array:
    """The weight in float32, decoded if it is in 4 bits."""
    return dequantize(weight) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
