"""Chooses the axis of each leaf of a model's trees that is split over the devices of a mesh."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qlora_jax.models.trees import flatten
from qlora_jax.quant import QTensor
from qlora_jax.quant.sharded import Sharded
from qlora_jax.runtime.mesh import DATA, FSDP, ROWS, on_devices, put_on_devices

WHOLE_BELOW = 2**12
"""An array of a layer with fewer elements than this is not split: every device holds all of it."""

OUTER = {"embed": -1, "head": -2}
"""Arrays outside the layers that are split, and their split axis: the axis of the hidden size."""

LAYERS = "runs."
"""Prefix of the path of every array in a stack of layers."""

IN_CODES = {"codes": 2, "scales": 2, "nested": 1}
"""Leaf of a QTensor to n: one of the last n axes of this leaf may be split."""

SPLIT = PartitionSpec(ROWS)
"""Partition spec of the arrays of a batch [B, T]: the rows are split over all devices."""

Axes = tuple[tuple[int | None, ...], ...]
"""One tuple for each array or QTensor of a tree, in the tree's order. A tuple holds, for each leaf,
the axis that is split, counted from the last axis (-1); None: every device holds the whole leaf."""


class MeshLayout(NamedTuple):
    """The split of a model's trained tree and frozen tree over a mesh.

    Attributes:
      mesh: mesh with the axes `DATA` and `FSDP`; an abstract mesh if no array is on the devices.
      trained: split axes of the trained tree.
      frozen: split axes of the frozen tree.
    """

    mesh: Mesh | AbstractMesh
    trained: Axes
    frozen: Axes

    def specs(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns the partition specs of both trees."""
        return specs(trained, self.trained), specs(frozen, self.frozen)

    def local_parts(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns this device's part of both trees, from which a model can be built.

        Call it inside `on_devices`.
        """
        return in_parts(trained, self.trained), in_parts(frozen, self.frozen)

    def shardings(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns the sharding of each leaf of both trees."""
        return (
            _shardings(self.mesh, trained, self.trained),
            _shardings(self.mesh, frozen, self.frozen),
        )

    def put_on_devices(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns both trees with every leaf placed on the devices by its sharding."""
        return put_on_devices((trained, frozen), self.shardings(trained, frozen))

    def replicate(self, tree: Any) -> Any:
        """Returns a tree whose leaves are replicated: every device holds every leaf whole."""
        return put_on_devices(
            tree, jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), tree)
        )

    def moments(self, layer: Mapping[str, Any], state: Any) -> Any:
        """Returns the shardings of the optimizer state of one layer.

        A leaf of the state is split like the array of the layer that has the same shape. A leaf of
        any other shape is split if its shape allows.

        Args:
          layer: one layer of a `LayerGroup`: path to array, from `layer_groups.take_layer`.
          state: optimizer state of this layer, as arrays or shapes.
        """
        parts = self.mesh.shape[FSDP]
        known = {
            leaf.shape: _array_axis(path, leaf.shape, parts)
            for path, each in layer.items()
            for leaf in jax.tree.leaves(each)
        }

        def one(x: Any) -> NamedSharding:
            axis = known.get(x.shape, _array_axis(LAYERS, x.shape, parts))
            return NamedSharding(self.mesh, _spec(x.ndim, axis))

        return jax.tree.map(one, state)


def layout_of(mesh: Mesh | AbstractMesh, trained: Any, frozen: Any) -> MeshLayout:
    """Chooses the split of both trees of a model over a mesh."""
    return MeshLayout(mesh, axes_of(mesh, trained), axes_of(mesh, frozen))


def axes_of(mesh: Mesh | AbstractMesh, tree: Any) -> Axes:
    """Chooses the split axes of one tree, trained or frozen."""
    return tuple(_axes(mesh, path, held) for path, held in flatten(tree, _is_q).items())


def shardings(mesh: Mesh, path: str, held: Any, like: Any) -> Any:
    """Returns the shardings of the leaves of one array or QTensor.

    Args:
      mesh: mesh with the axes `DATA` and `FSDP`.
      path: path of the array or QTensor in the model's trees.
      held: the array or QTensor, or its shapes; the split axes are chosen for it.
      like: value that gets the shardings: `held`, or one layer of it if `held` is a stack.
    """
    return _shardings(mesh, like, (_axes(mesh, path, held),))


def on_mesh(mesh: Mesh | None, function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Calls a function on every device of a mesh, each with its part of a model's tree.

    Args:
      mesh: the mesh; None calls the function directly, with the whole tree.
      function: function of (tree, *rest); it can build a model from the tree that it gets.
      tree: model tree, whose arrays are split along `axes_of`.
      rest: further arguments, the same on every device.

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
    """Returns the split axis of an array, or None.

    Args:
      path: path of the array in the model's trees.
      shape: shape of the array without the axis of layers.
      parts: number of devices along `FSDP`.
    """
    if path in OUTER:
        return OUTER[path] if parts > 1 and shape[OUTER[path]] % parts == 0 else None
    if not path.startswith(LAYERS) or len(shape) < 2 or math.prod(shape) < WHOLE_BELOW:
        return None
    return _divided(shape, 2, parts)


def _divided(shape: Sequence[int], most: int, parts: int) -> int | None:
    """Returns the first of the last `most` axes that `parts` divides, or None.

    The first axis comes first because a weight that is split by rows gathers fastest.
    """
    if parts == 1:
        return None
    return next((a for a in range(-most, 0) if shape[a] % parts == 0), None)


def unsplit_bytes(tree: Any, axes: Axes) -> dict[str, int]:
    """Returns path to bytes of each weight that should be split, but that no axis allows to split.

    Every device holds such a weight whole.
    """
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
    """Returns the sharding of each leaf of a tree."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, axes))


def in_parts(tree: Any, axes: Axes) -> Any:
    """Returns this device's part of a tree; every split array or QTensor becomes a `Sharded`.

    Call it inside `jax.shard_map`.
    """
    held, structure = jax.tree.flatten(tree, is_leaf=_is_q)
    marked = [x if set(own) == {None} else Sharded(x, own) for x, own in zip(held, axes)]
    return jax.tree.unflatten(structure, marked)


def sum_gradients(gradients: Any, axes: Axes) -> Any:
    """Returns the gradients summed over all devices. Call it inside `jax.shard_map`.

    The gradient of a split array is summed over `DATA` only: the transpose of the gather has
    already summed it over `FSDP`.
    """
    leaves, structure = jax.tree.flatten(gradients)
    flat = itertools.chain.from_iterable(axes)
    sums = [jax.lax.psum(g, ROWS if a is None else DATA) for g, a in zip(leaves, flat)]
    return jax.tree.unflatten(structure, sums)


def _is_q(x: Any) -> bool:
    return isinstance(x, QTensor)
