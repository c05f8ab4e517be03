"""Makes models of published shapes with random 4-bit codes on the device, in seconds and no file.

Speed and memory of a step do not depend on the weights' values, so no weight is quantized. Codes
are drawn in their stored form, and scales so that decoded weights have the standard deviation of an
initialized model. Every value is a hash of its indices, computed in the array itself, so that
making an array takes no other memory.
"""

import dataclasses
import functools
import itertools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config import Config, LoraConfig
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.spec import SCALINGS
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.trees import SplitModel, flatten
from qlora_jax.plan.abstract import abstract_model
from qlora_jax.quant import QTensor
from qlora_jax.quant.codebooks import codebook
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import GROUP
from qlora_jax.runtime.errors import UserError

SPREAD = 0.02
"""Standard deviation of weights, embeddings and head, as in `bench.random_models`."""

SCALES = 0.5, 1.5
"""Range of the blocks' scales, in units of their mean."""

NESTED = 0.1, 0.3
"""Range of the nested scales, in units of the offset."""


def random_model(config: Config, decoder: DecoderConfig, kernel: str | None) -> SplitModel:
    """Returns the model that a run of this config would train, with random weights.

    The adapters are new, as at the first step of a run.

    Args:
      config: config of the run; the model's files are not opened.
      decoder: shapes of the model.
      kernel: implementation of products with 4-bit weights; None picks one.

    Raises:
      UserError: the settings do not fit the shapes, or the adapters differ between layers or are
        initialized from the weights.
    """
    abstract = abstract_model(config, decoder, kernel)
    if config.method != "full":
        _check_adapters(nnx.merge(*abstract), config.lora)
    trained, frozen = (fill(tree, config, config.train.seed) for tree in abstract[1:])
    return SplitModel(abstract.graph, trained, frozen)


def fill(tree: Any, config: Config, seed: int) -> Any:
    """Returns random arrays on the default device for a tree of shapes.

    4-bit weights have uniformly random codes. Decoded 4-bit weights, other weights, embeddings and
    the head have the standard deviation `SPREAD`; norms are 1, biases 0. A has the standard
    deviation that `lora.init` sets, B is 0.

    Args:
      tree: tree with leaves `jax.ShapeDtypeStruct`, such as `plan.abstract.abstract_model` makes.
      config: config of the run; only `quant` and `lora` are read.
      seed: seed of the values; a seed gives the same values on every device.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_quantized)
    paths = flatten(tree, _is_quantized)
    made = [
        quantized(leaf, config.quant.codebook, OnDevice(_salt(seed, path)))
        if _is_quantized(leaf)
        else _array(path, leaf, config.lora, _salt(seed, path))
        for path, leaf in zip(paths, leaves)
    ]
    return jax.block_until_ready(jax.tree.unflatten(structure, made))


def _array(path: str, leaf: jax.ShapeDtypeStruct, lora: LoraConfig, salt: np.uint32) -> jax.Array:
    *_, owner, name = ("", *path.split("."))
    if owner == "adapter":
        if name == "scale":
            return jnp.full(leaf.shape, SCALINGS[lora.scaling](lora.alpha, lora.rank), leaf.dtype)
        if name in ("norm", "magnitude"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        *_, inputs, rank = leaf.shape
        return _around(salt, leaf, 1 / rank if lora.init == "gaussian" else (3 * inputs) ** -0.5)
    if name == "bias":
        return jnp.zeros(leaf.shape, leaf.dtype)
    if "norm" in owner:
        return jnp.ones(leaf.shape, leaf.dtype)
    return _around(salt, leaf, SPREAD)


class OnDevice:
    """A source of random values on the default device, hashes of their indices; each draw differs.

    Args:
      salt: seed of the hashes.
    """

    def __init__(self, salt: np.uint32):
        self._salts = (np.uint32((int(salt) + i) % 2**32) for i in itertools.count())

    def codes(self, shape: tuple[int, ...], in_features: int, zero: int) -> jax.Array:
        """Draws `QTensor.codes` of a shape."""
        return _codes(next(self._salts), shape, in_features, zero)

    def indices(self, shape: tuple[int, ...]) -> jax.Array:
        """Draws uint8 of a shape, uniformly from 0 to 255."""
        return _bytes(next(self._salts), shape)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
        """Draws float32 of a shape, uniformly between two bounds."""
        return _uniform(next(self._salts), shape, jnp.float32, low, high)


class OnHost:
    """A source of random values from NumPy, for many different shapes: it compiles nothing.

    Args:
      source: generator of NumPy.
    """

    def __init__(self, source: np.random.Generator):
        self._source = source

    def codes(self, shape: tuple[int, ...], in_features: int, zero: int) -> np.ndarray:
        """Draws `QTensor.codes` of a shape."""
        return _padded(self.indices(shape), in_features, zero, np)

    def indices(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draws uint8 of a shape, uniformly from 0 to 255."""
        return self._source.integers(0, 256, shape, np.uint8)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """Draws float32 of a shape, uniformly between two bounds."""
        return self._source.uniform(low, high, shape).astype(np.float32)


def quantized(q: QTensor, name: str, source: OnDevice | OnHost) -> QTensor:
    """Returns a 4-bit weight of random codes on the default device.

    Args:
      q: QTensor whose arrays are shapes, such as `jax.ShapeDtypeStruct`.
      name: name of the codebook.
      source: source of the codes and scales.
    """
    book = codebook(name, q.block_size)
    scales = q.scales.shape
    made: dict[str, Any] = {
        "codes": source.codes(q.codes.shape, q.in_features, _code_of_zero(book)),
        "codebook": np.broadcast_to(book, q.codebook.shape),
    }
    if q.nested is None or q.offset is None:
        low, high = (_mean_scale(book, *_moments(SCALES)) * bound for bound in SCALES)
        made["scales"] = source.uniform(scales, low, high)
    else:
        indices, nested = dynamic_map().astype(np.float64), _moments(NESTED)
        # In units of the offset, a scale is 1 + dynamic_map()[index] * nested.
        first = 1 + indices.mean() * nested[0]
        second = 2 * first - 1 + np.square(indices).mean() * nested[1]
        offset = _mean_scale(book, first, second)
        low, high = (offset * bound for bound in NESTED)
        made |= {
            "scales": source.indices(scales),
            "nested": source.uniform(q.nested.shape, low, high),
            "offset": np.full(q.offset.shape, offset, np.float32),
        }
    return jax.device_put(dataclasses.replace(q, **made))


def _code_of_zero(book: np.ndarray) -> int:
    """Returns the code that `quantize` gives to a zero."""
    return int(np.sum((book[1:] + book[:-1]) / 2 < 0))


def _moments(bounds: tuple[float, float]) -> tuple[float, float]:
    """Returns the means of t and of t² for a t that is uniform between the bounds."""
    low, high = bounds
    return (low + high) / 2, (low**2 + low * high + high**2) / 3


def _mean_scale(book: np.ndarray, first: float, second: float) -> float:
    """Returns f such that codebook[code] * f * t has the standard deviation `SPREAD`.

    Args:
      book: codebook, float32[16]; all codes are equally likely.
      first, second: means of t and of t².
    """
    values = book.astype(np.float64)
    return SPREAD / math.sqrt(np.square(values).mean() * second - (values.mean() * first) ** 2)


def _around(salt: np.uint32, leaf: jax.ShapeDtypeStruct, deviation: float) -> jax.Array:
    bound = math.sqrt(3) * deviation
    return _uniform(salt, leaf.shape, leaf.dtype, -bound, bound)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniform(
    salt: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, low: float, high: float
) -> jax.Array:
    unit = (_noise(salt, shape) >> 8).astype(jnp.float32) * 2.0**-24
    return (low + (high - low) * unit).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _bytes(salt: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (_noise(salt, shape) >> 24).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _codes(salt: jax.Array, shape: tuple[int, ...], in_features: int, zero: int) -> jax.Array:
    """Returns random `QTensor.codes`; rows beyond `in_features` hold the code of zero."""
    return _padded(_bytes(salt, shape), in_features, zero, jnp)


def _padded(codes: Any, in_features: int, zero: int, xp: Any) -> Any:
    """Puts the code of zero into rows beyond `in_features`; `xp` is `numpy` or `jax.numpy`."""
    if 2 * codes.shape[-2] == in_features:
        return codes
    row = xp.arange(codes.shape[-2])[:, None]
    low = row // (GROUP // 2) * GROUP + row % (GROUP // 2)
    low_codes = xp.where(low < in_features, codes & 15, zero)
    high_codes = xp.where(low + GROUP // 2 < in_features, codes >> 4, zero)
    return (low_codes | high_codes << 4).astype(xp.uint8)


def _noise(salt: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform uint32 of a shape: hashes of the salt and the indices.

    The hash takes the indices axis by axis, because an array may have more than 2^32 elements.
    """
    x = jnp.uint32(salt)
    for axis, length in enumerate(shape):
        index = jnp.arange(length, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
        x = _mixed(x ^ index.reshape(-1, *[1] * (len(shape) - axis - 1)))
    return x


def _mixed(x: jax.Array) -> jax.Array:
    """Applies MurmurHash3's last step: every bit of the input affects every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _salt(seed: int, path: str) -> np.uint32:
    """Returns a salt that depends on the seed and the leaf's path."""
    return np.uint32(zlib.crc32(f"{seed} {path}".encode()))


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QTensor)


def _check_adapters(model: Decoder, lora: LoraConfig) -> None:
    if lora.init in INITIALIZERS or lora.from_adapter is not None:
        raise UserError(
            "random weights need new adapters: remove lora.from_adapter, and set lora.init "
            "to kaiming-uniform or gaussian"
        )
    if outer := model.outer_adapters():
        raise UserError(
            f"random weights support no adapter on {next(iter(outer))}; remove it from "
            "lora.target_modules"
        )
    adapters = [own.adapter for run in model.runs for own in run.linears().values() if own.adapter]
    if len({spec for adapter in adapters for spec in adapter.specs}) > 1:
        raise UserError(
            "random weights need the same adapters in all layers: remove lora.rank_pattern "
            "and lora.alpha_pattern, and name whole modules in lora.target_modules"
        )
