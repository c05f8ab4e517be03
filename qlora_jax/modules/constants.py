"""Separates the arrays of a tree, which JAX traces, from its other leaves."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant:
    """A leaf of a result that is not an array, stored in the tree's static structure."""

    value: Any


def packed(results: Any) -> Any:
    """Returns a tree with only arrays as leaves: every other leaf becomes a `Constant`."""
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array | np.ndarray) else Constant(x), results
    )


def unpacked(results: Any) -> Any:
    """Undoes `packed`: replaces each `Constant` by its value."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Constant) else x,
        results,
        is_leaf=lambda x: isinstance(x, Constant),
    )


def arrays_of(
    tree: Any, kinds: tuple[type, ...] = (jax.Array,)
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Returns the leaves of some types, and a function that puts new leaves in their places.

    Args:
      tree: any pytree.
      kinds: types of the leaves to return.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, kinds)]

    def put(arrays: Sequence[Any]) -> Any:
        full = list(leaves)
        for i, x in zip(places, arrays):
            full[i] = x
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in places], put
