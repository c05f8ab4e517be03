"""Splits the trained tree into groups of stacked layers, which are updated layer by layer.

The optimizer state is stored for each layer separately. So the moments can live on the host and
come to the device one layer at a time (compare paged optimizers: QLoRA, arXiv 2305.14314,
section 3).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from qlora_jax.lora.masks import is_variable
from qlora_jax.models.trees import flatten
from qlora_jax.runtime.mesh import stack_like, stack_on_hosts

STACKS = "runs"
"""Key of the trained tree under which each entry is a stack of layers."""

OUTER = {"embed_adapter", "head_adapter"}
"""Keys outside the layers; a trained tree with only these keys has no adapter on any layer."""


class LayerGroup(NamedTuple):
    """The trained leaves of one run of layers, or those outside the layers.

    Attributes:
      places: indices of the group's leaves in the flattened trained tree.
      paths: dotted path of each leaf.
      variables: structure of the variable around each leaf; the optimizer treats a leaf by the kind
        of its variable.
      run: index of the run of layers; None for the group outside the layers.
      layers: number of layers in the stack; None for the group outside the layers, which counts
        as one layer (`size`).
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
    """Returns the groups of a trained tree, in the order of its leaves.

    Args:
      trained: `nnx.State` or other mapping, with arrays or abstract shapes.

    Raises:
      KeyError: the tree has keys outside `OUTER` but no key `STACKS`, where its layers would be.
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
    """Returns a map from path to leaf for a group, with each leaf in a variable of its kind."""
    return {
        path: jax.tree.unflatten(variable, [leaf])
        for path, variable, leaf in zip(group.paths, group.variables, leaves)
    }


def stack_leaves(group: LayerGroup, stack: Mapping[str, Any]) -> list[jax.Array]:
    """Returns the leaves of a map that `stack` returned; the inverse of `stack`."""
    return [jax.tree.leaves(stack[path])[0] for path in group.paths]


def take_layer(
    group: LayerGroup, leaves: Sequence[jax.Array], index: int | jax.Array
) -> dict[str, Any]:
    """Returns one layer of a group as a map from path to leaf, each in a variable of its kind."""
    if group.layers is None:
        return stack(group, leaves)
    taken = [jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in leaves]
    return stack(group, taken)


def put_layer(
    group: LayerGroup, leaves: Sequence[jax.Array], index: int | jax.Array, new: Mapping[str, Any]
) -> list[jax.Array]:
    """Returns the leaves of the group with one layer replaced."""
    if group.layers is None:
        return stack_leaves(group, new)
    return [
        jax.lax.dynamic_update_index_in_dim(leaf, x, index, 0)
        for leaf, x in zip(leaves, stack_leaves(group, new))
    ]


def init_layers(trained: Any, one: Callable[[dict[str, Any]], Any]) -> tuple[Any, ...]:
    """Returns `one(layer)` for every layer of the trained tree, in the order of the groups."""
    leaves = jax.tree.leaves(trained)
    return tuple(
        one(take_layer(group, [leaves[p] for p in group.places], i))
        for group in find_groups(trained)
        for i in range(group.size)
    )


def stack_states(trained: Any, states: Sequence[Any]) -> tuple[Any, ...]:
    """Returns, for each group, the states of its layers stacked along a leading axis.

    The stacks are numpy arrays on the host. If other processes hold a part of the states, the
    stacks are jax arrays with the placement of the single states.
    """
    rest = list(states)
    made = []
    for group in find_groups(trained):
        own, rest = rest[: group.size], rest[group.size :]
        made.append(jax.tree.map(lambda *x: stack_on_hosts(x), *own))
    return tuple(made)


def stack_states_like(trained: Any, states: Sequence[Any]) -> tuple[Any, ...]:
    """Returns placeholders without memory, in the shapes and dtypes of `stack_states`' result."""
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
    """Returns the states of single layers from stacks; the inverse of `stack_states`.

    Each state gets the dtypes and the placement of its counterpart in `like`.
    """
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
