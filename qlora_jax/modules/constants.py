"""What of arguments and results is no array, kept beside what JAX traces."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant:
    """A result that is no array."""

    value: Any


def packed(results: Any) -> Any:
    """Returns a tree of arrays alone, with all other leaves in its structure."""
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array | np.ndarray) else Constant(x), results
    )


def unpacked(results: Any) -> Any:
    """Returns what `packed` was given."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Constant) else x,
        results,
        is_leaf=lambda x: isinstance(x, Constant),
    )


def arrays_of(
    tree: Any, kinds: tuple[type, ...] = (jax.Array,)
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Returns a tree's leaves of some kinds, and a function of others that puts these in place."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, kinds)]

    def put(arrays: Sequence[Any]) -> Any:
        full = list(leaves)
        for i, x in zip(places, arrays):
            full[i] = x
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in places], put
