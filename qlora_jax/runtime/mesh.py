"""Makes the two-axis mesh of a run's devices, and moves arrays to and from it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from qlora_jax.runtime.errors import UserError

DATA = "data"
"""Mesh axis along which weights are replicated."""

FSDP = "fsdp"
"""Mesh axis over which weights are sharded."""

ROWS = (DATA, FSDP)
"""Mesh axes over which the rows of a batch are sharded: both."""


def device_mesh(data: int, fsdp: int) -> Mesh | None:
    """Makes a mesh of the first data x fsdp devices; a host's devices are neighbours in `FSDP`.

    Args:
      data: number of devices along `DATA`.
      fsdp: number of devices along `FSDP`.

    Returns:
      The mesh; None for one device, which needs no mesh.

    Raises:
      UserError: jax has fewer than data x fsdp devices; or there are several processes and jax has
        more devices.
    """
    devices, asked = jax.devices(), data * fsdp
    if asked == 1 and jax.process_count() == 1:
        return None
    sizes = f"mesh {{data: {data}, fsdp: {fsdp}}} is for {asked} devices, and jax has "
    if asked > len(devices):
        more = " (JAX_NUM_CPU_DEVICES=N gives N devices)" if devices[0].platform == "cpu" else ""
        raise UserError(
            f"{sizes}{len(devices)}{more}; give --mesh none for one device, or sizes whose product "
            "is the number of devices"
        )
    if jax.process_count() > 1 and asked != len(devices):
        raise UserError(
            f"{sizes}{len(devices)} in {jax.process_count()} processes, all of which must take "
            f"part; give sizes whose product is {len(devices)}, such as "
            f"--mesh.data=1 --mesh.fsdp={len(devices)}"
        )
    return Mesh(np.array(devices[:asked]).reshape(data, fsdp), (DATA, FSDP))


def on_devices(
    mesh: Mesh | AbstractMesh, function: Callable[..., Any], inputs: Any, results: Any
) -> Callable[..., Any]:
    """Returns a function that runs on every device of a mesh, on the device's shards.

    Args:
      mesh: mesh of the devices.
      function: function of one device's shards; may use collectives.
      inputs: partition specs of the arguments.
      results: partition specs of the results.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=results, check_vma=False)


def put_on_devices(tree: Any, shardings: Any) -> Any:
    """Puts arrays on the devices; each process has the whole array and stores only its shards.

    Args:
      tree: arrays, equal in every process, or arrays that are already on the mesh.
      shardings: tree with the sharding of each array.
    """
    return jax.tree.map(_sent, tree, shardings)


def replicated_sharding(tree: Any) -> NamedSharding | None:
    """Returns the sharding of an array replicated on the tree's mesh; None without a mesh."""
    first = jax.tree.leaves(tree)[0]
    if isinstance(first, jax.core.Tracer) or not isinstance(first.sharding, NamedSharding):
        return None
    return NamedSharding(first.sharding.mesh, PartitionSpec())


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns an array as numpy's; gathers other processes' shards, so all must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def stack_on_hosts(arrays: Sequence[jax.Array]) -> jax.Array | np.ndarray:
    """Stacks arrays of one shape and sharding, in the memory of the hosts.

    Returns:
      A numpy array; if other processes hold shards, an array on the same devices.
    """
    first = arrays[0]
    if first.is_fully_addressable:
        return np.stack([np.asarray(x) for x in arrays])
    home = stacked_sharding(first.sharding)
    parts = [
        jax.device_put(
            np.stack([np.asarray(shard.data) for shard in alike]),
            SingleDeviceSharding(alike[0].device, memory_kind=home.memory_kind),
        )
        for alike in zip(*(x.addressable_shards for x in arrays))
    ]
    shape = (len(arrays), *first.shape)
    return jax.make_array_from_single_device_arrays(shape, home, parts)


def stack_like(x: Any, count: int) -> Any:
    """Returns a placeholder for the result of `stack_on_hosts` of `count` arrays like `x`.

    The placeholder is a numpy array that takes no memory, or a ShapeDtypeStruct for an array on
    the devices.
    """
    shape = (count, *x.shape)
    if x.sharding.is_fully_addressable:
        return np.broadcast_to(np.zeros((), x.dtype), shape)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=stacked_sharding(x.sharding))


def stacked_sharding(one: Any) -> NamedSharding:
    """Returns the sharding of a stack in which each layer has the sharding `one`."""
    return NamedSharding(one.mesh, PartitionSpec(None, *one.spec), memory_kind=one.memory_kind)


def _sent(x: Any, sharding: Sharding) -> jax.Array:
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    held = np.asarray(x)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])
