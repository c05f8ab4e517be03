"""The trained tree in units, a layer each, which are updated one after another.

Moments exist per unit, so that they can live elsewhere and come to the device a unit at a time
(QLoRA, section 3: paged optimizers).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from qlora_jax.lora.masks import is_variable
from qlora_jax.models.trees import flatten
from qlora_jax.runtime.mesh import stack_like, stack_on_hosts

STACKS = "runs"
"""The part of a trained tree whose parts are stacks of layers."""

OUTER = {"embed_adapter", "head_adapter"}
"""Parts that may be the whole of a trained tree: no layer has an adapter then."""


class LayerGroup(NamedTuple):
    """Leaves that are stacked alike: a run of layers, or everything outside the layers.

    Attributes:
      places: of its leaves in the flattened trained tree.
      paths: their dotted paths.
      variables: the structure of the variable around each leaf, whose kind the optimizer goes by.
      run: index of the run of layers; None outside the layers.
      layers: length of the stack; None outside the layers.
    """

    places: tuple[int, ...]
    paths: tuple[str, ...]
    variables: tuple[jax.tree_util.PyTreeDef, ...]
    run: int | None
    layers: int | None

    @property
    def size(self) -> int:
        return 1 if self.layers is None else self.layers


def find_groups(trained: Any) -> list[LayerGroup]:
    """Returns the groups of a trained tree, in its own order.

    Args:
      trained: an `nnx.State` or another mapping, of arrays or abstract shapes.

    Raises:
      KeyError: the tree has no `STACKS`, so that its layers are not to be found.
    """
    leaves, structure = jax.tree.flatten(trained)
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    outside = {name: part for name, part in numbered.items() if name != STACKS}
    stacks = {} if numbered.keys() <= OUTER else numbered[STACKS]
    parts = [(outside, None), *((stack, int(run)) for run, stack in stacks.items())]
    paths = list(flatten(trained))
    variables = [jax.tree.structure(x) for x in jax.tree.leaves(trained, is_leaf=is_variable)]
    return [
        LayerGroup(
            tuple(places),
            tuple(paths[p] for p in places),
            tuple(variables[p] for p in places),
            run,
            None if run is None else leaves[places[0]].shape[0],
        )
        for places, run in sorted(
            ((jax.tree.leaves(part), run) for part, run in parts), key=lambda found: found[0]
        )
        if places
    ]


def stack(group: LayerGroup, leaves: Sequence[jax.Array]) -> dict[str, Any]:
    """Returns a group's leaves by path, each in a variable of its kind."""
    return {
        path: jax.tree.unflatten(variable, [leaf])
        for path, variable, leaf in zip(group.paths, group.variables, leaves)
    }


def stack_leaves(group: LayerGroup, stack: Mapping[str, Any]) -> list[jax.Array]:
    """Returns the leaves that `stack` was given."""
    return [jax.tree.leaves(stack[path])[0] for path in group.paths]


def take_layer(
    group: LayerGroup, leaves: Sequence[jax.Array], index: int | jax.Array
) -> dict[str, Any]:
    """Returns one unit of a group's leaves by path, each in a variable of its kind."""
    if group.layers is None:
        return stack(group, leaves)
    taken = [jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in leaves]
    return stack(group, taken)


def put_layer(
    group: LayerGroup, leaves: Sequence[jax.Array], index: int | jax.Array, new: Mapping[str, Any]
) -> list[jax.Array]:
    """The group's leaves with one unit replaced."""
    if group.layers is None:
        return stack_leaves(group, new)
    return [
        jax.lax.dynamic_update_index_in_dim(leaf, x, index, 0)
        for leaf, x in zip(leaves, stack_leaves(group, new))
    ]


def init_layers(trained: Any, one: Callable[[dict[str, Any]], Any]) -> tuple[Any, ...]:
    """`one(unit)` for every unit of the tree, in order."""
    leaves = jax.tree.leaves(trained)
    return tuple(
        one(take_layer(group, [leaves[p] for p in group.places], i))
        for group in find_groups(trained)
        for i in range(group.size)
    )


def stack_states(trained: Any, states: Sequence[Any]) -> tuple[Any, ...]:
    """Per group, the states of its units as one tree of arrays with a leading axis.

    They are numpy's, unless other processes hold a part of them: then they are where the units are.
    """
    rest = list(states)
    made = []
    for group in find_groups(trained):
        own, rest = rest[: group.size], rest[group.size :]
        made.append(jax.tree.map(lambda *x: stack_on_hosts(x), *own))
    return tuple(made)


def stack_states_like(trained: Any, states: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays of no content and no memory, of the shapes and dtypes that `stack_states` gives."""
    first, made = 0, []
    for group in find_groups(trained):
        made.append(
            jax.tree.map(
                lambda x, n=group.size: stack_like(x, n),
                states[first],
            )
        )
        first += group.size
    return tuple(made)


def unstack_states(trained: Any, stacks: Sequence[Any], like: Sequence[Any]) -> tuple[Any, ...]:
    """The units' states that `stack_states` joined, each placed where its counterpart in `like` is."""
    rest = list(like)
    made = []
    for group, stack in zip(find_groups(trained), stacks):
        for i in range(group.size):
            made.append(
                jax.tree.map(
                    lambda x, old, i=i: jax.device_put(x[i].astype(old.dtype), old.sharding),
                    stack,
                    rest.pop(0),
                )
            )
    return tuple(made)
