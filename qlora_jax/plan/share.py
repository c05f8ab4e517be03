"""Counts the bytes of trees that are on one device; on a mesh each holds a part of most arrays."""

import math
from typing import Any

import jax


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree that one device holds.

    Args:
      tree: of arrays or their shapes; one that does not say where it lives is all on each device.
    """
    return sum(math.prod(_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shape(x: Any) -> tuple[int, ...]:
    home = getattr(x, "sharding", None)
    return x.shape if home is None else home.shard_shape(x.shape)
