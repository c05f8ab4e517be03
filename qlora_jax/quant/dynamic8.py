"""Arrays in 8 bits a value: bitsandbytes' block-wise dynamic quantization (arXiv 2110.02861).

An array is cut, in the order of its memory, into blocks of 256. A block keeps its absmax in
float32 and, of each value, the nearest of 256 values that are dense at zero and at absmax.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=["signed"]
)
@dataclasses.dataclass(frozen=True)
class Dynamic8:
    """An array in 8 bits a value and 32 bits a block.

    In the order of memory, value i = map[codes[i]] * absmax[i // 256], in float32.

    Attributes:
      codes: uint8, of the array's shape; indices into the map.
      absmax: float32[ceil(size / 256)]; the last block may be short.
      signed: which map, see `dynamic_map`.
    """

    codes: jax.Array
    absmax: jax.Array
    signed: bool


def encode8(x: jax.Array, signed: bool = True) -> Dynamic8:
    """Rounds an array to 8 bits a value, block by block.

    Args:
      x: float32 of any shape, finite; non-negative unless `signed`.
      signed: which map, see `dynamic_map`.
    """
    scaled, absmax = scale_to_one(blocks(x.reshape(-1), BLOCK))
    codes = nearest(scaled, signed).reshape(-1)[: x.size]
    return Dynamic8(codes.reshape(x.shape), absmax, signed)


def decode8(q: Dynamic8) -> jax.Array:
    """The array that `encode8` stored, float32 of its shape."""
    scales = jnp.repeat(q.absmax, BLOCK)[: q.codes.size].reshape(q.codes.shape)
    return jnp.asarray(dynamic_map(q.signed))[q.codes] * scales


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """bitsandbytes' 8-bit dynamic data type (arXiv 1511.04561).

    Decade i of seven, which end at 1e-6 to 1, holds 2**i values of each sign (unsigned: 2**(i+1)
    values) at the middle of evenly spaced steps between 0.1 and 1 of its end; 0 and 1 complete
    the 256.

    Args:
      signed: for values of both signs, or for those that are never negative.

    Returns:
      float32[256], ascending.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _even_edges(2 ** (i if signed else i + 1))
        middle = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middle, *(-middle if signed else [])]
    return np.sort(np.array(values, np.float32))


def nearest(x: jax.Array, signed: bool = True) -> jax.Array:
    """Indices of the map's values nearest to x; of two that are equally near, the lower one.

    The middle between two values is rounded to float32, as in bitsandbytes.

    Args:
      x: float32, any shape.
      signed: which map, see `dynamic_map`.

    Returns:
      uint8 of the shape of x.
    """
    first, middle = (jnp.asarray(table) for table in _search_tables(signed))
    index = first[jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16]
    return index + (x > middle[index]).astype(jnp.uint8)


def scale_to_one(blocked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks [..., n, size] divided by their absmax, and that, float32[..., n]."""
    absmax = jnp.max(jnp.abs(blocked), axis=-1)
    # A reciprocal first, as in bitsandbytes; that of a smaller number than tiny is infinite.
    return blocked * (1.0 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))[..., None], absmax


def blocks(flat: jax.Array, size: int) -> jax.Array:
    """The last axis cut into blocks, [..., ceil(n / size), size]; zeros fill the last one."""
    pad = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % size)]
    return jnp.pad(flat, pad).reshape(*flat.shape[:-1], -1, size)


@functools.cache
def _search_tables(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    # A float's upper 16 bits leave at most one middle between two values of the map that it may
    # be above or below: one look-up and one comparison, where a binary search takes eight.
    values = dynamic_map(signed)
    middle = (values[1:] + values[:-1]) / 2
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lowest = np.where(upper >> 31, upper | 0xFFFF, upper).view(np.float32)
    return np.searchsorted(middle, lowest).astype(np.uint8), np.append(middle, np.float32(np.inf))


def _even_edges(steps: int) -> np.ndarray:
    # float32 counted from the nearer end, each product and sum rounded once: the last bits of
    # the map follow from it.
    low, high = np.float32(0.1), np.float32(1)
    step, i = np.float64((high - low) / np.float32(steps)), np.arange(steps + 1)
    edges = np.where(2 * i < steps + 1, low + step * i, high - step * (steps - i))
    return edges.astype(np.float32)
