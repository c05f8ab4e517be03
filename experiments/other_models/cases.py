"""A model of another package, what is quantized and adapted in it, and its loss."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

BATCH, LENGTH, VOCABULARY, HIDDEN, RANK = 2, 16, 128, 64, 4
"""Shapes of every case. A contraction of 64 is one block of 4-bit codes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that somebody else wrote.

    Attributes:
      name: package and model.
      module: name of the package, whose presence shows that it is installed.
      build: makes the model from a seed, and for Linen the module and its params.
      example: makes the arguments of the model's call.
      outputs: picks logits or other outputs from what the call returns.
      kernels: `where` of the weights to quantize.
      adapted: `where` of the weights that get adapters.
      linen: whether it is a Linen module.
      dtype: dtype of its weights and of its computation.
    """

    name: str
    module: str
    build: Callable[[int], Any]
    example: Callable[[], tuple[Any, ...]]
    outputs: Callable[[Any], jax.Array]
    kernels: str
    adapted: str
    linen: bool = False
    dtype: DTypeLike = jnp.float32


def random_weights(params: Any, seed: int) -> Any:
    """Returns params of which those with two axes or more are drawn, with deviation 0.1.

    Packages start some kernels at zero, and a comparison of zeros says nothing.

    Args:
      params: tree of arrays or variables.
      seed: seed of the drawing; a leaf's numbers depend on its path as well.
    """
    key = jax.random.key(seed)

    def drawn(path: Any, x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return 0.1 * jax.random.normal(own, x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(drawn, params)


def drawn(model: nnx.Module, seed: int) -> nnx.Module:
    """Fills a model's weights with random numbers, in place, and returns it."""
    nnx.update(model, random_weights(nnx.state(model, nnx.Param), seed))
    return model


def tokens() -> jax.Array:
    """Random tokens, int32[BATCH, LENGTH]."""
    return jax.random.randint(jax.random.key(7), (BATCH, LENGTH), 1, VOCABULARY)


def loss(outputs: jax.Array) -> jax.Array:
    """Returns how far outputs are from fixed targets: a scalar.

    For logits [BATCH, LENGTH, VOCABULARY] it is the mean cross-entropy of the next token of
    `tokens`, for others the mean squared distance from random numbers.
    """
    if outputs.shape == (BATCH, LENGTH, VOCABULARY):
        logits = outputs[:, :-1].astype(jnp.float32)
        labels = tokens()[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    targets = jax.random.normal(jax.random.key(8), outputs.shape)
    return jnp.mean((outputs - targets) ** 2)
