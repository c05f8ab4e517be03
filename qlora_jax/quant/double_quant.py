"""Double quantization: block scales stored in 8 bits (QLoRA, section 3).

The scales of a layer, in bitsandbytes' order (column by column of W), are shifted by their mean,
cut into blocks of 256 and rounded to bitsandbytes' 8-bit dynamic map. The paper says FP8; the
map is what its released code uses.
"""

import jax
import jax.numpy as jnp

from qlora_jax.quant.dynamic8 import blocks, dynamic_map, nearest, scale_to_one


def quantize_scales(scales: jax.Array, nested_block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounds block scales to 8 bits.

    Args:
      scales: float32[..., nb, N].
      nested_block: scales per block of scales.

    Returns:
      codes uint8[..., nb, N], nested absmax float32[..., ceil(nb*N/nested_block)] and
      offset float32[...].
    """
    flat = _column_major(scales)
    # Summed in two stages, which stays within 2 ulp of bitsandbytes' mean.
    total = jnp.sum(jnp.sum(blocks(flat, 256), axis=-1), axis=-1)
    offset = unfused(total / flat.shape[-1])
    scaled, absmax = scale_to_one(blocks(flat - offset[..., None], nested_block))
    # A block without spread gets code 0, as in bitsandbytes; its nested absmax is 0.
    codes = jnp.where((absmax > 0)[..., None], nearest(scaled), 0)
    codes = codes.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]]
    nb, n = scales.shape[-2:]
    return codes.reshape(*codes.shape[:-1], n, nb).swapaxes(-1, -2), absmax, offset


def dequantize_scales(
    codes: jax.Array, nested: jax.Array, offset: jax.Array, nested_block: int
) -> jax.Array:
    """The block scales that `quantize_scales` stored, float32[..., nb, N]."""
    nb, n = codes.shape[-2:]
    index = (jnp.arange(n)[None, :] * nb + jnp.arange(nb)[:, None]) // nested_block
    product = jnp.asarray(dynamic_map())[codes] * nested[..., index]
    return unfused(product) + offset[..., None, None]


def unfused(product: jax.Array) -> jax.Array:
    """The product, rounded to float32 before it is added to something."""
    # A clip between a product and a sum keeps XLA from contracting them into an FMA, which
    # would differ from bitsandbytes in the last bit. An optimization barrier does not, on 0.10.
    return jnp.clip(product, -3e38, 3e38)


def _column_major(x: jax.Array) -> jax.Array:
    return x.swapaxes(-1, -2).reshape(*x.shape[:-2], -1)
