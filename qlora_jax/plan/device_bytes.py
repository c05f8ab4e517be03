"""Counts the bytes of trees on one device; on a mesh a device holds a part of most arrays."""

import math
from typing import Any

import jax


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device.

    Args:
      tree: tree of arrays or shapes; a leaf without sharding is whole on each device.
    """
    return sum(math.prod(_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shape(x: Any) -> tuple[int, ...]:
    home = getattr(x, "sharding", None)
    return x.shape if home is None else home.shard_shape(x.shape)
