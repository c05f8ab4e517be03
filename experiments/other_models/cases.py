"""A model of another package, the weights to quantize and to adapt, and its loss."""

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
"""Sizes of every case. A contraction over 64 features is one block of 4-bit codes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of another package.

    Attributes:
      name: name of the package and of the model.
      module: import name of the package, to find out whether it is installed.
      build: function from a seed to the model; for Linen, to the module and its params.
      example: function that returns the arguments of the model's call.
      outputs: function that picks logits or other outputs from the call's result.
      kernels: `where` of the weights to quantize.
      adapted: `where` of the weights that get adapters.
      linen: whether the model is a Linen module.
      dtype: dtype of the weights and of the computation.
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
    """Returns params with random numbers, of deviation 0.1, in the arrays of two axes or more.

    Some packages initialize kernels with zeros, and a comparison of zeros shows nothing.

    Args:
      params: tree of arrays or variables.
      seed: seed of the random numbers; those of a leaf also depend on its path.
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
    """Returns random tokens, int32[BATCH, LENGTH]."""
    return jax.random.randint(jax.random.key(7), (BATCH, LENGTH), 1, VOCABULARY)


def loss(outputs: jax.Array) -> jax.Array:
    """Returns the loss of outputs against fixed targets, a scalar.

    The loss of logits [BATCH, LENGTH, VOCABULARY] is the mean cross-entropy of the next token of
    `tokens`; the loss of other outputs is the mean squared distance from random numbers.
    """
    if outputs.shape == (BATCH, LENGTH, VOCABULARY):
        logits = outputs[:, :-1].astype(jnp.float32)
        labels = tokens()[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    targets = jax.random.normal(jax.random.key(8), outputs.shape)
    return jnp.mean((outputs - targets) ** 2)
