"""A weight that is sharded over the devices of a mesh and gathered for each product.

Inside `jax.shard_map` a program sees only the shards of its own device. A shard of a 4-bit weight
consists of codes and scales, so devices exchange 4 bits per weight.
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
    """An array or a QTensor in shards, one on each device along the mesh axis `FSDP`.

    Attributes:
      part: shard of this device.
      axes: split axis of each leaf of `part`, as a negative number (-1 is the last axis); None if
        every device holds the whole leaf.
    """

    part: jax.Array | QTensor
    axes: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight, [..., K, N]."""
        size = jax.lax.axis_size(FSDP)
        shape = list(self.part.shape)
        if isinstance(self.part, QTensor):
            # axes[0] is the split axis of the codes; in_features is already the whole K
            shape[-1] *= size if self.axes[0] == -1 else 1
        elif self.axes[0] is not None:
            shape[self.axes[0]] *= size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the whole weight."""
        return self.part.ndim

    def whole(self) -> Any:
        """Gathers the shards of all devices into the original array or QTensor, bit for bit.

        The transpose of this operation, used for gradients, sums over the devices and leaves each
        device its shard.
        """
        leaves, tree = jax.tree.flatten(self.part)
        return jax.tree.unflatten(tree, map(_gathered, leaves, self.axes))

    def part_of(self, whole: jax.Array, dtype: jax.typing.DTypeLike) -> "Sharded":
        """Sums the arrays of all devices, and returns this device's shard of the sum.

        Args:
          whole: this device's array, of the shape of the whole weight.
          dtype: dtype of the result; the sum is rounded to it.
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
    """Returns a `Sharded` weight gathered from all devices, and any other object unchanged."""
    return x.whole() if isinstance(x, Sharded) else x


def looked_up(table: jax.Array | Sharded, index: jax.Array, axis: int = 0) -> jax.Array:
    """Returns vectors of a table, [..., D].

    If the table is sharded along D, the table does not move. Each device reads its part of the
    vectors that all devices need, and sends each part to the device that needs the vector.

    Args:
      table: [vectors, D]; or [D, vectors] if `axis` is 1.
      index: numbers of the vectors, integers [B, ...]; [B] if `axis` is 1.
      axis: axis of the table along which the vectors are numbered, 0 or 1.
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
