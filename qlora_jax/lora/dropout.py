"""Random keys for dropout: one key for a batch, one key per row, or keys that a module draws.

With one key per row, the elements dropped in a row do not depend on the other rows of the batch or
on the device.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class LoraKey(nnx.Variable):
    """A key for dropout, or the count of keys drawn from it."""


def split(key: jax.Array, count: int) -> jax.Array:
    """Splits a key into keys [count], or the keys of rows [B] into keys [count, B]."""
    if not _of_rows(key):
        return jax.random.split(key, count)
    return jax.vmap(lambda own: jax.random.split(own, count), out_axes=1)(key)


def fold_in(key: jax.Array, number: int | jax.Array) -> jax.Array:
    """Applies `jax.random.fold_in` to a key, or to each key of the rows [B]."""
    fold = jax.random.fold_in
    return jax.vmap(fold, (0, None))(key, number) if _of_rows(key) else fold(key, number)


def keep_mask(key: jax.Array, share: float, shape: Sequence[int]) -> jax.Array:
    """Draws the mask of the elements to keep.

    Args:
      key: one key, or the keys of the rows [B].
      share: probability that an element is kept.
      shape: shape of the mask; with keys of rows, its first axis is the rows.

    Returns:
      bool[shape], True for an element to keep.
    """
    if not _of_rows(key):
        return jax.random.bernoulli(key, share, tuple(shape))
    return jax.vmap(lambda own: jax.random.bernoulli(own, share, tuple(shape[1:])))(key)


def _of_rows(key: jax.Array) -> bool:
    # an old-style (uint32) key has one axis although it is a single key
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) and key.ndim == 1


class DropoutKeys(nnx.Module):
    """A stream of dropout keys for each layer of a stack, like the stream of `nnx.Dropout`.

    Attributes:
      key: base key of each layer, uint32[*stack, 2].
      count: number of keys drawn, uint32[*stack].
      deterministic: True turns dropout off; `eval()` and `train()` of the model set it.
    """

    def __init__(self, key: jax.Array, stack: tuple[int, ...]):
        data = jax.random.key_data(jax.random.split(key, stack))
        self.key = LoraKey(data)
        self.count = LoraKey(jnp.zeros(stack, jnp.uint32))
        self.deterministic = False

    def draw(self) -> jax.Array | None:
        """Returns the next key of each layer, uint32[*stack, 2]; None if nothing is dropped."""
        if self.deterministic:
            return None
        count = self.count.get_value()
        fold = jax.random.fold_in
        for _ in range(count.ndim):
            fold = jax.vmap(fold)
        key = fold(self.key.get_value(), count)
        self.count.set_value(count + 1)
        return key
