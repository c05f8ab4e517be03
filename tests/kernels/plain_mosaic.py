"""The device code of the Mosaic kernels, written again in plain JAX for Pallas' interpreter.

The interpreter runs pipelines, shared memory and copies, and looks for races among them, but it
cannot run code written for threads. This module computes the same values without threads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic.kernel import DeviceCode, MosaicKernel
from qlora_jax.kernels.mosaic.operand import WARPS
from qlora_jax.quant.double_quant import unfused
from qlora_jax.quant.qtensor import block_scales


def device_code(kernel: MosaicKernel, count: int) -> DeviceCode:
    """Replaces `mosaic.device_code`."""
    operand, dtype = kernel.operand, kernel.dtype

    def scales_of(scales, layer, o, step) -> jax.Array:
        rows, width = operand.scale_shape
        k_tile, n_tile = (operand.o, operand.c) if operand.transposed else (operand.c, operand.o)
        k, n = (o, step) if operand.transposed else (step, o)
        b = k * k_tile // operand.block_size + jnp.arange(rows)[:, None]
        n = n * n_tile + jnp.arange(width)[None, :]
        nb = scales[0].shape[1]
        b = jnp.minimum(b, nb - 1)
        found = scales[0][...][layer, b, n]
        if count > 1:
            nested, offset, levels = (ref[...] for ref in scales[1:])
            index = jnp.minimum((n * nb + b) // kernel.nested_block, nested.shape[1] - 1)
            found = unfused(levels[found.astype(jnp.int32)] * nested[layer, index]) + offset[layer]
        found = found.astype(dtype)
        if operand.transposed:
            return found
        bits = lax.bitcast_convert_type(found, jnp.uint16).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits | bits << 16, jnp.int32)

    def prepare(codebook, table, slot, aside, scales, layer, o, first) -> None:
        values = codebook[...][layer].astype(dtype)
        bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32)
        byte = jnp.arange(256)
        pairs = lax.bitcast_convert_type(bits[byte & 15] | bits[byte >> 4] << 16, jnp.int32)
        table[...] = jnp.broadcast_to(pairs[:, None], table.shape)
        slot[...] = scales_of(scales, layer, o, first)

    def multiply(left, codes, table, now, later, aside, scales, layer, o, i, total) -> jax.Array:
        pairs = lax.bitcast_convert_type(table[...][:, 0], jnp.uint32)[codes[...].astype(jnp.int32)]
        halves = [_value(pairs & 0xFFFF, dtype), _value(pairs >> 16, dtype)]
        groups = [half.reshape(-1, 32, half.shape[-1]) for half in halves]
        w = jnp.concatenate(groups, axis=1).reshape(-1, pairs.shape[-1])
        scale = now[...]
        if not operand.transposed:
            scale = _value(lax.bitcast_convert_type(scale, jnp.uint32) & 0xFFFF, dtype)
        # without this rounding, XLA would pass the product to the next one in float32
        bits = jnp.finfo(dtype)
        w = lax.reduce_precision(
            w * jnp.repeat(scale, w.shape[0] // scale.shape[0], axis=0), bits.nexp, bits.nmant
        )
        later[...] = scales_of(scales, layer, o, jnp.minimum(i + 1, kernel.steps - 1))
        right = w.T if operand.transposed else w
        parts = WARPS if operand.split else 1
        lefts = jnp.split(left[...], parts, axis=1)
        products = [
            jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))
            for a, b in zip(lefts, jnp.split(right, parts))
        ]
        product = jnp.concatenate(products)
        # the device code has a barrier here
        plgpu.commit_smem()
        return total + (product.T if operand.form == "wgmma" else product)

    def finish(total, table, out, m, o) -> None:
        shape = (kernel.tile.m, kernel.tile.o)
        place = tuple(pl.ds(i * size, size) for i, size in zip((m, o), shape))
        total = total.T if operand.form == "wgmma" else total
        out[place] = total.reshape(-1, *shape).sum(axis=0).astype(kernel.out_dtype)

    return DeviceCode(prepare, multiply, finish)


def _value(bits: jax.Array, dtype) -> jax.Array:
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), dtype)


def rounded_weight(q, dtype) -> np.ndarray:
    """Returns the kernels' weight in float64: codebook, scale and product rounded to dtype."""
    codes = np.asarray(q.codes)
    halves = [half.reshape(-1, 32, codes.shape[1]) for half in (codes & 15, codes >> 4)]
    index = np.concatenate(halves, axis=1).reshape(-1, codes.shape[1])[: q.in_features]
    values = np.asarray(q.codebook).astype(dtype).astype(np.float32)[index]
    scales = np.asarray(block_scales(q)).astype(dtype).astype(np.float32)
    scales = np.repeat(scales, q.block_size, axis=0)[: q.in_features]
    return (values * scales).astype(dtype).astype(np.float64)
