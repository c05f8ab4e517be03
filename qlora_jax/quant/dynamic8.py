"""Arrays in 8 bits per value: bitsandbytes' block-wise dynamic quantization (arXiv 2110.02861).

The array is cut, in memory order, into blocks of 256. Each block stores its absmax in float32, and
each value x of the block stores the index of the entry of `dynamic_map` nearest to x / absmax.
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
    """An array stored in 8 bits per value and 32 bits per block.

    In memory order, value i = map[codes[i]] * absmax[i // 256], in float32.

    Attributes:
      codes: indices into the map, uint8 of the array's shape.
      absmax: absmax of each block, float32[ceil(size / 256)]; the last block may be short.
      signed: selects the map, see `dynamic_map`.
    """

    codes: jax.Array
    absmax: jax.Array
    signed: bool


def encode8(x: jax.Array, signed: bool = True) -> Dynamic8:
    """Rounds an array to 8 bits per value, block by block.

    Args:
      x: finite float32 array of any shape; non-negative unless `signed`.
      signed: selects the map, see `dynamic_map`.
    """
    scaled, absmax = scale_to_one(blocks(x.reshape(-1), BLOCK))
    codes = nearest(scaled, signed).reshape(-1)[: x.size]
    return Dynamic8(codes.reshape(x.shape), absmax, signed)


def decode8(q: Dynamic8) -> jax.Array:
    """Returns the decoded array, float32 of the original shape."""
    scales = jnp.repeat(q.absmax, BLOCK)[: q.codes.size].reshape(q.codes.shape)
    return jnp.asarray(dynamic_map(q.signed))[q.codes] * scales


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """Returns bitsandbytes' 8-bit dynamic data type (arXiv 1511.04561).

    There are seven decades, i = 0 to 6. Decade i divides the range from 0.1 * 10**(i-6) to
    10**(i-6) into n equal steps, and its values are the middles of the steps. With signs, n = 2**i
    and each value exists with both signs; without, n = 2**(i+1). The values 0 and 1 complete the
    256.

    Args:
      signed: True for values of both signs; False for values that are never negative.

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
    """Returns the indices of the map's values nearest to x; a tie goes to the lower index.

    The middle between two values is rounded to float32, as in bitsandbytes.

    Args:
      x: float32 array of any shape.
      signed: selects the map, see `dynamic_map`.

    Returns:
      Indices, uint8 of the shape of x.
    """
    first, middle = (jnp.asarray(table) for table in _search_tables(signed))
    index = first[jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16]
    return index + (x > middle[index]).astype(jnp.uint8)


def scale_to_one(blocked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns blocks [..., n, size] divided by their absmax, and the absmax, float32[..., n]."""
    absmax = jnp.max(jnp.abs(blocked), axis=-1)
    # bitsandbytes multiplies by the reciprocal. Below tiny the reciprocal may be infinite.
    return blocked * (1.0 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny))[..., None], absmax


def blocks(flat: jax.Array, size: int) -> jax.Array:
    """Cuts the last axis into blocks, [..., ceil(n / size), size]; zeros fill the last block."""
    pad = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % size)]
    return jnp.pad(flat, pad).reshape(*flat.shape[:-1], -1, size)


@functools.cache
def _search_tables(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    # The upper 16 bits of a float leave at most one middle (between two neighbours of the map)
    # undecided. So one look-up and one comparison replace the eight of a binary search.
    values = dynamic_map(signed)
    middle = (values[1:] + values[:-1]) / 2
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lowest = np.where(upper >> 31, upper | 0xFFFF, upper).view(np.float32)
    return np.searchsorted(middle, lowest).astype(np.uint8), np.append(middle, np.float32(np.inf))


def _even_edges(steps: int) -> np.ndarray:
    # Each edge is computed from the nearer end, and each product and sum is rounded once. The last
    # bits of the map depend on this.
    low, high = np.float32(0.1), np.float32(1)
    step, i = np.float64((high - low) / np.float32(steps)), np.arange(steps + 1)
    edges = np.where(2 * i < steps + 1, low + step * i, high - step * (steps - i))
    return edges.astype(np.float32)
