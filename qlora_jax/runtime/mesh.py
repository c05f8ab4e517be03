"""The devices of a run as a mesh of two axes, and arrays on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from qlora_jax.runtime.errors import UserError

DATA = "data"
"""The axis along which weights are the same."""

FSDP = "fsdp"
"""The axis over which weights are split."""

ROWS = (DATA, FSDP)
"""The axes over which the rows of a batch are split: both."""


def device_mesh(data: int, fsdp: int) -> Mesh | None:
    """Arranges the first data x fsdp devices; the devices of a host are neighbours along `FSDP`.

    Args:
      data: devices along `DATA`.
      fsdp: devices along `FSDP`.

    Returns:
      The mesh; None for one device, which needs none.

    Raises:
      UserError: there are fewer devices, or several processes and more devices.
    """
    devices, asked = jax.devices(), data * fsdp
    if asked == 1 and jax.process_count() == 1:
        return None
    sizes = f"mesh {{data: {data}, fsdp: {fsdp}}} is for {asked} devices, and jax has "
    if asked > len(devices):
        more = " (JAX_NUM_CPU_DEVICES=N makes N of a CPU)" if devices[0].platform == "cpu" else ""
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


def sent(tree: Any, shardings: Any) -> Any:
    """Puts arrays where they live; every process has all of each array and keeps its own parts.

    Args:
      tree: arrays, the same in every process, or arrays that are on the mesh already.
      shardings: of its leaves.
    """
    return jax.tree.map(_sent, tree, shardings)


def _sent(x: Any, sharding: Sharding) -> jax.Array:
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_sent(jax.random.key_data(x), sharding))
    held = np.asarray(x)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])
