"""The range of keys that each query sees, stored as its first and last key."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyRange(NamedTuple):
    """The keys that each query sees: `first` to `last`, both included.

    Attributes:
      first: index of the first key that each query sees, int32[B, T].
      last: index of the last key that each query sees, int32[B, T].
    """

    first: jax.Array
    last: jax.Array

    def within(self, window: jax.Array) -> "KeyRange":
        """Returns the last `window` keys of each range, or the whole range if it is shorter.

        Args:
          window: number of keys in the sliding window, int32[].
        """
        return KeyRange(jnp.maximum(self.first, self.last - window + 1), self.last)


def in_segments(segments: jax.Array) -> KeyRange:
    """Returns, for each query, the keys from the first token of its segment to the query itself.

    Args:
      segments: segment number of each token, int32[B, T]; equal neighbours are one segment.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = segments[:, 1:] != segments[:, :-1]
    starts = jnp.where(jnp.pad(begins, ((0, 0), (1, 0))), index, 0)
    return KeyRange(jax.lax.cummax(starts, axis=1), index)


def up_to(positions: jax.Array) -> KeyRange:
    """Returns the keys 0 to `positions`, int32[B, T]: the cache slots that are filled."""
    return KeyRange(jnp.zeros_like(positions), positions)
