"""A weight of which every device of a mesh holds a part; it is whole while a product uses it.

Inside `jax.shard_map` a program sees its own device's parts alone. The parts of a 4-bit weight are
parts of its codes and scales, so what moves between devices is 4 bits a weight.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from qlora_jax.quant.qtensor import QTensor
from qlora_jax.runtime.mesh import FSDP


@nnx.register_data_type
@functools.partial(jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Sharded:
    """An array or a QTensor in parts, one on each device along the mesh axis `FSDP`.

    Attributes:
      part: this device's part.
      axes: for each leaf of `part`, the axis that is split, counted from the last, which is -1;
        None where every device has all of it.
    """

    part: jax.Array | QTensor
    axes: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight, [..., K, N]."""
        size = jax.lax.axis_size(FSDP)
        shape = list(self.part.shape)
        if isinstance(self.part, QTensor):
            # of the codes; K is known without them
            shape[-1] *= size if self.axes[0] == -1 else 1
        elif self.axes[0] is not None:
            shape[self.axes[0]] *= size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.part.ndim

    def whole(self) -> Any:
        """Gathers the weight from all devices: an array or a QTensor, bit for bit what was split.

        Its transpose, for gradients, adds up what the devices have and leaves each its part.
        """
        leaves, tree = jax.tree.flatten(self.part)
        return jax.tree.unflatten(tree, map(_gathered, leaves, self.axes))

    def part_of(self, whole: jax.Array, dtype: jax.typing.DTypeLike) -> "Sharded":
        """Adds up all devices' arrays of the whole's shape, and keeps this device's part.

        Args:
          whole: this device's array.
          dtype: dtype of the result, to which the sum is rounded.
        """
        (axis,) = self.axes
        if axis is None:
            part = jax.lax.psum(whole, FSDP)
        else:
            part = jax.lax.psum_scatter(
                whole, FSDP, scatter_dimension=whole.ndim + axis, tiled=True
            )
        return Sharded(part.astype(dtype), self.axes)


def whole(x: Any) -> Any:
    """Returns a weight gathered from all devices; anything but a `Sharded` as it is."""
    return x.whole() if isinstance(x, Sharded) else x


def looked_up(table: jax.Array | Sharded, index: jax.Array, axis: int = 0) -> jax.Array:
    """Returns vectors of a table, [..., D].

    Of a table whose vectors are split, each device reads its part of the vectors of all devices,
    which then go to the device that asked: the table does not move.

    Args:
      table: [vectors, D], or [D, vectors] with axis 1.
      index: integers [B, ...]; [B] with axis 1.
      axis: which axis of the table counts the vectors.
    """
    if not isinstance(table, Sharded):
        return table[:, index].T if axis else table[index]
    everyone = jax.lax.all_gather(index, FSDP, axis=0, tiled=True)
    own: Any = table.part
    parts = own[:, everyone].T if axis else own[everyone]
    return jax.lax.all_to_all(parts, FSDP, 0, parts.ndim - 1, tiled=True)


def _gathered(leaf: jax.Array, axis: int | None) -> jax.Array:
    if axis is None:
        return leaf
    return jax.lax.all_gather(leaf, FSDP, axis=leaf.ndim + axis, tiled=True)
