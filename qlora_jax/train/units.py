"""The trained tree in units, a layer each, which are updated one after another.

Moments exist per unit, so that they can live elsewhere and come to the device a unit at a time
(QLoRA, section 3: paged optimizers).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qlora_jax.models.trees import flatten

STACK = re.compile(r"runs\.\d+\.")


class Group(NamedTuple):
    """Leaves that are stacked alike: a run of layers, or everything outside the layers.

    Attributes:
      places: of its leaves in the flattened trained tree.
      paths: their dotted paths.
      layers: length of the stack; None outside the layers.
    """

    places: tuple[int, ...]
    paths: tuple[str, ...]
    layers: int | None

    @property
    def units(self) -> int:
        return 1 if self.layers is None else self.layers


def groups(trained: Any) -> list[Group]:
    """The groups of a trained tree of arrays or abstract shapes, runs of layers by their order."""
    found: dict[str, list[tuple[int, str, int | None]]] = {}
    for place, (path, leaf) in enumerate(flatten(trained).items()):
        run = STACK.match(path)
        found.setdefault(run[0] if run else "", []).append(
            (place, path, leaf.shape[0] if run else None)
        )
    return [
        Group(tuple(p for p, _, _ in rows), tuple(n for _, n, _ in rows), rows[0][2])
        for rows in found.values()
    ]


def unit(group: Group, leaves: Sequence[jax.Array], index: int | jax.Array) -> dict[str, jax.Array]:
    """One unit of a group's leaves by path."""
    if group.layers is None:
        return dict(zip(group.paths, leaves))
    taken = [jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in leaves]
    return dict(zip(group.paths, taken))


def put(
    group: Group, leaves: Sequence[jax.Array], index: int | jax.Array, new: Mapping[str, jax.Array]
) -> list[jax.Array]:
    """The group's leaves with one unit replaced."""
    if group.layers is None:
        return [new[path] for path in group.paths]
    return [
        jax.lax.dynamic_update_index_in_dim(leaf, new[path], index, 0)
        for path, leaf in zip(group.paths, leaves)
    ]


def init(trained: Any, one: Callable[[dict[str, jax.Array]], Any]) -> tuple[Any, ...]:
    """`one(unit)` for every unit of the tree, in order."""
    leaves = jax.tree.leaves(trained)
    return tuple(
        one(unit(group, [leaves[p] for p in group.places], i))
        for group in groups(trained)
        for i in range(group.units)
    )


def stacked(trained: Any, states: Sequence[Any]) -> tuple[Any, ...]:
    """Per group, the states of its units as one tree of numpy arrays with a leading axis."""
    rest = list(states)
    made = []
    for group in groups(trained):
        own, rest = rest[: group.units], rest[group.units :]
        made.append(jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *own))
    return tuple(made)


def stacked_like(trained: Any, states: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays of no content and no memory, of the shapes and dtypes that `stacked` gives."""
    first, made = 0, []
    for group in groups(trained):
        made.append(
            jax.tree.map(
                lambda x, n=group.units: np.broadcast_to(np.zeros((), x.dtype), (n, *x.shape)),
                states[first],
            )
        )
        first += group.units
    return tuple(made)


def unstacked(trained: Any, stacks: Sequence[Any], like: Sequence[Any]) -> tuple[Any, ...]:
    """The units' states that `stacked` joined, each placed where its counterpart in `like` is."""
    rest = list(like)
    made = []
    for group, stack in zip(groups(trained), stacks):
        for i in range(group.units):
            made.append(
                jax.tree.map(
                    lambda x, old, i=i: jax.device_put(x[i].astype(old.dtype), old.sharding),
                    stack,
                    rest.pop(0),
                )
            )
    return tuple(made)
