"""Which keys each query sees: a range, of which the first and the last are kept."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyRange(NamedTuple):
    """The keys `first` to `last`, both included, that each query sees: int32[B, T] each."""

    first: jax.Array
    last: jax.Array

    def within(self, window: jax.Array) -> "KeyRange":
        """Returns the part of a range that ends with the last key and has at most `window` keys.

        Args:
          window: int32[].
        """
        return KeyRange(jnp.maximum(self.first, self.last - window + 1), self.last)


def in_segments(segments: jax.Array) -> KeyRange:
    """Returns the keys from the beginning of a query's segment up to the query itself.

    Args:
      segments: int32[B, T]; equal neighbours are one segment.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = segments[:, 1:] != segments[:, :-1]
    starts = jnp.where(jnp.pad(begins, ((0, 0), (1, 0))), index, 0)
    return KeyRange(jax.lax.cummax(starts, axis=1), index)


def up_to(positions: jax.Array) -> KeyRange:
    """Returns the keys 0 to `positions`, int32[B, T]: the slots of a cache that are filled."""
    return KeyRange(jnp.zeros_like(positions), positions)
