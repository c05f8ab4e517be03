"""Double quantization: block scales stored in 8 bits (QLoRA, section 3).

The scales of a layer, in bitsandbytes' order (column by column of W), are shifted by their mean,
cut into blocks of 256 and rounded to bitsandbytes' 8-bit dynamic map. The paper says FP8; the
map is what its released code uses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def dynamic_map() -> np.ndarray:
    """bitsandbytes' signed 8-bit dynamic data type (arXiv 1511.04561).

    Decade i of seven, from 1e-6 to 1, holds 2**i values of each sign at the middle of evenly
    spaced steps between 0.1 and 1 of it; 0 and 1 complete the 256.

    Returns:
      float32[256], ascending.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _even_edges(2**i)
        middle = (edges[:-1] + edges[1:]) / np.float32(2)
        values += [sign * np.float32(10.0 ** (i - 6)) * m for m in middle for sign in (1, -1)]
    return np.sort(np.array(values, np.float32))


def _even_edges(steps: int) -> np.ndarray:
    # float32 counted from the nearer end, each product and sum rounded once: the last bits of
    # the map follow from it.
    low, high = np.float32(0.1), np.float32(1)
    step, i = np.float64((high - low) / np.float32(steps)), np.arange(steps + 1)
    edges = np.where(2 * i < steps + 1, low + step * i, high - step * (steps - i))
    return edges.astype(np.float32)


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
    total = jnp.sum(jnp.sum(_blocks(flat, 256), axis=-1), axis=-1)
    offset = unfused(total / flat.shape[-1])
    blocks = _blocks(flat - offset[..., None], nested_block)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks * (1.0 / jnp.where(absmax > 0, absmax, 1.0))[..., None]
    table = jnp.asarray(dynamic_map())
    codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled)
    # A block without spread gets code 0, as in bitsandbytes; its nested absmax is 0.
    codes = jnp.where((absmax > 0)[..., None], codes, 0).astype(jnp.uint8)
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


def _blocks(flat: jax.Array, size: int) -> jax.Array:
    pad = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % size)]
    return jnp.pad(flat, pad).reshape(*flat.shape[:-1], -1, size)
