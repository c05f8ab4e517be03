"""Double quantization: stores the block scales (absmax) in 8 bits (QLoRA, section 3).

The scales of a layer are ordered as in bitsandbytes, column by column of W. With `nested_block`
scales in a block of scales (256 in the paper) and `map` the 8-bit dynamic map of bitsandbytes:

    offset     = mean(scale)
    nested[j]  = max |scale[i] - offset| over the block j of scales
    code[i]    = nearest entry of map to (scale[i] - offset) / nested[j]
    scale'[i]  = map[code[i]] * nested[i // nested_block] + offset

The paper names FP8 as the 8-bit type. Its released code uses the dynamic map, and so does this
module. At a block size of 64 the scales cost 8/64 + 32/(64 * 256) = 0.127 bits per parameter
instead of 32/64 = 0.5.
"""

import jax
import jax.numpy as jnp

from qlora_jax.quant.dynamic8 import blocks, dynamic_map, nearest, scale_to_one


def quantize_scales(scales: jax.Array, nested_block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounds block scales to 8 bits.

    Args:
      scales: block scales, float32[..., nb, N].
      nested_block: scales per block of scales.

    Returns:
      codes: uint8[..., nb, N]
      nested: absmax of each block of scales, float32[..., ceil(nb*N/nested_block)]
      offset: mean of the scales, float32[...]
    """
    flat = _column_major(scales)
    # The sum in two stages stays within 2 ulp of bitsandbytes' mean.
    total = jnp.sum(jnp.sum(blocks(flat, 256), axis=-1), axis=-1)
    offset = unfused(total / flat.shape[-1])
    scaled, absmax = scale_to_one(blocks(flat - offset[..., None], nested_block))
    # If all scales of a block equal the mean, their code is 0, as in bitsandbytes; nested is 0.
    codes = jnp.where((absmax > 0)[..., None], nearest(scaled), 0)
    codes = codes.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]]
    nb, n = scales.shape[-2:]
    return codes.reshape(*codes.shape[:-1], n, nb).swapaxes(-1, -2), absmax, offset


def dequantize_scales(
    codes: jax.Array, nested: jax.Array, offset: jax.Array, nested_block: int
) -> jax.Array:
    """Returns map[codes] * nested + offset: the block scales, float32[..., nb, N]."""
    nb, n = codes.shape[-2:]
    index = (jnp.arange(n)[None, :] * nb + jnp.arange(nb)[:, None]) // nested_block
    product = jnp.asarray(dynamic_map())[codes] * nested[..., index]
    return unfused(product) + offset[..., None, None]


def unfused(product: jax.Array) -> jax.Array:
    """Returns the product, rounded to float32, so that XLA cannot fuse it with a later sum."""
    # XLA would contract a product and a sum into an FMA, which differs from bitsandbytes in the
    # last bit. A clip between the two prevents this; an optimization barrier does not (jax 0.10).
    return jnp.clip(product, -3e38, 3e38)


def _column_major(x: jax.Array) -> jax.Array:
    return x.swapaxes(-1, -2).reshape(*x.shape[:-2], -1)
