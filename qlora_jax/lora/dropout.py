"""Dropout's random numbers: one key for all rows, or one for each, and keys that a module draws.

With a key for each row, what is dropped in a row depends on neither the rows beside it nor the
device that it is on.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class LoraKey(nnx.Variable):
    """A key for dropout, or the number of keys that were drawn from it."""


def split(key: jax.Array, count: int) -> jax.Array:
    """Returns so many keys [count], or keys of rows [count, B], from a key or from keys [B]."""
    if not _of_rows(key):
        return jax.random.split(key, count)
    return jax.vmap(lambda own: jax.random.split(own, count), out_axes=1)(key)


def fold_in(key: jax.Array, number: int | jax.Array) -> jax.Array:
    """Returns `jax.random.fold_in` of a key, or of the keys of rows [B]."""
    fold = jax.random.fold_in
    return jax.vmap(fold, (0, None))(key, number) if _of_rows(key) else fold(key, number)


def keep_mask(key: jax.Array, share: float, shape: Sequence[int]) -> jax.Array:
    """Draws which elements stay.

    Args:
      key: a key, or the keys of rows [B].
      share: of the elements that stay, on average.
      shape: of the result; its first axis is the rows, if they have keys.

    Returns:
      bool[shape].
    """
    if not _of_rows(key):
        return jax.random.bernoulli(key, share, tuple(shape))
    return jax.vmap(lambda own: jax.random.bernoulli(own, share, tuple(shape[1:])))(key)


def _of_rows(key: jax.Array) -> bool:
    # an old-style key has an axis of its own
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) and key.ndim == 1


class DropoutKeys(nnx.Module):
    """A stream of keys for each layer of a stack, as `nnx.Dropout` has one.

    Attributes:
      key: uint32[*stack, 2].
      count: uint32[*stack], keys drawn.
      deterministic: whether nothing is dropped; set by `eval()` and `train()` of the model.
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
