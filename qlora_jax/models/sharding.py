"""Which axis of each leaf of a model's trees is split over the devices of a mesh."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qlora_jax.models.trees import flatten
from qlora_jax.quant import QTensor
from qlora_jax.quant.sharded import Sharded
from qlora_jax.runtime.mesh import DATA, FSDP, ROWS, on_devices, sent

WHOLE_BELOW = 2**12
"""Elements of one layer's array below which every device has all of it."""

OUTER = {"embed": -1, "head": -2}
"""Arrays outside the layers that are split, and the axis, that of the hidden size."""

LAYERS = "runs."
"""Begins the path of a stack of layers."""

IN_CODES = {"codes": 2, "scales": 2, "nested": 1}
"""Leaves of a QTensor that are split, and of how many of the last axes one may be."""

SPLIT = PartitionSpec(ROWS)
"""Of the arrays of a batch [B, T]."""

Axes = tuple[tuple[int | None, ...], ...]
"""For each array and QTensor of a tree, in its order: the axis of each of its leaves that is split,
counted from the last; None where every device has the whole leaf."""


class MeshLayout(NamedTuple):
    """How a model's two trees are split over a mesh.

    Attributes:
      mesh: of the axes `DATA` and `FSDP`; an abstract one where no array is.
      trained: axes of the trained tree that are split.
      frozen: those of the frozen tree.
    """

    mesh: Mesh | AbstractMesh
    trained: Axes
    frozen: Axes

    def specs(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns the partition specs of both trees."""
        return specs(trained, self.trained), specs(frozen, self.frozen)

    def in_parts(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns a device's part of both trees, inside `on_devices`, as a model can be made of."""
        return in_parts(trained, self.trained), in_parts(frozen, self.frozen)

    def homes(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns where each leaf of both trees lives."""
        return (
            _shardings(self.mesh, trained, self.trained),
            _shardings(self.mesh, frozen, self.frozen),
        )

    def placed(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns both trees with every leaf on the devices that hold it."""
        return sent((trained, frozen), self.homes(trained, frozen))

    def everywhere(self, tree: Any) -> Any:
        """Returns a tree with all of every leaf on every device."""
        return sent(tree, jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), tree))

    def moments(self, unit: Mapping[str, Any], state: Any) -> Any:
        """Returns where an optimizer's state of a unit lives: each leaf as what it is of.

        Args:
          unit: path to array, as `layer_groups.take_layer` gives.
          state: arrays or shapes; leaves of other shapes than the unit's are split if they can be.
        """
        parts = self.mesh.shape[FSDP]
        known = {
            leaf.shape: _array_axis(path, leaf.shape, parts)
            for path, each in unit.items()
            for leaf in jax.tree.leaves(each)
        }

        def one(x: Any) -> NamedSharding:
            axis = known.get(x.shape, _array_axis(LAYERS, x.shape, parts))
            return NamedSharding(self.mesh, _spec(x.ndim, axis))

        return jax.tree.map(one, state)


def layout_of(mesh: Mesh | AbstractMesh, trained: Any, frozen: Any) -> MeshLayout:
    """Chooses how both trees of a model are split over a mesh."""
    return MeshLayout(mesh, axes_of(mesh, trained), axes_of(mesh, frozen))


def axes_of(mesh: Mesh | AbstractMesh, tree: Any) -> Axes:
    """Chooses the axes of a tree, trained or frozen, that are split."""
    return tuple(_axes(mesh, path, held) for path, held in flatten(tree, _is_q).items())


def shardings(mesh: Mesh, path: str, held: Any, like: Any) -> Any:
    """Returns where the leaves of one array or QTensor of a model live.

    Args:
      mesh: of the axes `DATA` and `FSDP`.
      path: in the model's trees.
      held: the array or QTensor, or its shapes.
      like: `held`, or one layer of the stack that it is.
    """
    return _shardings(mesh, like, (_axes(mesh, path, held),))


def on_mesh(mesh: Mesh | None, function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Calls a function on every device of a mesh, each with its part of a model's tree.

    Args:
      mesh: None calls it as it is.
      function: gets the tree, as a model can be made of it, and the rest.
      tree: of arrays that are split as `axes_of` says.
      rest: the same on every device.

    Returns:
      The function's result, the same on every device.
    """
    if mesh is None:
        return function(tree, *rest)
    axes, same = axes_of(mesh, tree), PartitionSpec()

    def on_a_device(tree: Any, *rest: Any) -> Any:
        return function(in_parts(tree, axes), *rest)

    inputs = specs(tree, axes), *[same] * len(rest)
    return on_devices(mesh, on_a_device, inputs, same)(tree, *rest)


def _axes(mesh: Mesh | AbstractMesh, path: str, held: Any) -> tuple[int | None, ...]:
    parts = mesh.shape[FSDP]
    if isinstance(held, QTensor):
        return tuple(
            _divided(leaf.shape, IN_CODES[name], parts) if name in IN_CODES else None
            for name, leaf in _leaves(held)
        )
    return (_array_axis(path, held.shape[1:] if path.startswith(LAYERS) else held.shape, parts),)


def _leaves(q: QTensor) -> Iterator[tuple[str, Any]]:
    """Yields the name of each leaf and the leaf, in the order of `jax.tree.leaves`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(q):
        yield path[-1].name, leaf


def _array_axis(path: str, shape: Sequence[int], parts: int) -> int | None:
    """Returns the axis of an array that is split.

    Args:
      path: in the model's trees.
      shape: without the axis of a stack of layers.
      parts: devices along `FSDP`.
    """
    if path in OUTER:
        return OUTER[path] if parts > 1 and shape[OUTER[path]] % parts == 0 else None
    if not path.startswith(LAYERS) or len(shape) < 2 or math.prod(shape) < WHOLE_BELOW:
        return None
    return _divided(shape, 2, parts)


def _divided(shape: Sequence[int], most: int, parts: int) -> int | None:
    """Returns the first of the last `most` axes that can be split evenly; rows gather fastest."""
    if parts == 1:
        return None
    return next((a for a in range(-most, 0) if shape[a] % parts == 0), None)


def undivided(tree: Any, axes: Axes) -> dict[str, int]:
    """Returns the bytes of what every device has all of since it could not be split, by path."""
    found: dict[str, int] = {}
    for (path, held), own in zip(flatten(tree, _is_q).items(), axes):
        leaves = jax.tree.leaves(held)
        shape = held.shape[1:] if path.startswith(LAYERS) else held.shape
        meant = path in OUTER or (path.startswith(LAYERS) and len(shape) == 2)
        if meant and own[0] is None and math.prod(shape) >= WHOLE_BELOW:
            found[path] = sum(x.size * x.dtype.itemsize for x in leaves)
    return found


def specs(tree: Any, axes: Axes) -> Any:
    """Returns a tree's partition specs, one for each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    flat = itertools.chain.from_iterable(axes)
    return jax.tree.unflatten(structure, [_spec(x.ndim, a) for x, a in zip(leaves, flat)])


def _spec(ndim: int, axis: int | None) -> PartitionSpec:
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*[FSDP if i == ndim + axis else None for i in range(ndim + axis + 1)])


def _shardings(mesh: Mesh | AbstractMesh, tree: Any, axes: Axes) -> Any:
    """Returns where each leaf of a tree lives."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, axes))


def in_parts(tree: Any, axes: Axes) -> Any:
    """Returns a device's part of a tree, inside `jax.shard_map`; what is split is `Sharded`."""
    held, structure = jax.tree.flatten(tree, is_leaf=_is_q)
    marked = [x if set(own) == {None} else Sharded(x, own) for x, own in zip(held, axes)]
    return jax.tree.unflatten(structure, marked)


def added_up(gradients: Any, axes: Axes) -> Any:
    """Adds up gradients over all devices, inside `jax.shard_map`.

    What is split is added up over `FSDP` already, by the gather's transpose.
    """
    leaves, structure = jax.tree.flatten(gradients)
    flat = itertools.chain.from_iterable(axes)
    sums = [jax.lax.psum(g, ROWS if a is None else DATA) for g, a in zip(leaves, flat)]
    return jax.tree.unflatten(structure, sums)


def _is_q(x: Any) -> bool:
    return isinstance(x, QTensor)
