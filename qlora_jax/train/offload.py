"""Keeps moments in host memory and moves them to the device for each layer's update.

This replaces the paged optimizers of QLoRA (arXiv 2305.14314, section 3), where the driver moves
pages between the two memories when the device is full. Here the program itself moves the moments,
one layer (`layer_groups`) at a time: the moments of a layer come to the device for the layer's
update and go back to the host, while the moments of the next layer are copied to the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from qlora_jax.config import Config


class Placement(NamedTuple):
    """The memory in which arrays are stored between uses, device or host, and its copy functions.

    Attributes:
      store: function that copies a tree from the device to the memory.
      fetch: function that copies a tree back to the device; returns before the copy is done.
      wait: function that waits until a tree has arrived in the memory. Without waiting, the copies
        of all layers would be in flight at one time.
      begin: function that prepares the state before the first step. For the host, it commits every
        array to its device: arrays fetched from the host are committed, so those of all later
        states are too, and jit would compile each program once more for uncommitted arrays.
    """

    store: Callable[[Any], Any]
    fetch: Callable[[Any], Any]
    wait: Callable[[Any], Any]
    begin: Callable[[Any], Any]


def _same(tree: Any) -> Any:
    return tree


def _to(kind: str) -> Callable[[Any], Any]:
    def move(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)

    return move


def _committed(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


ON_DEVICE = Placement(_same, _same, _same, _same)
ON_HOST = Placement(_to("pinned_host"), _to("device"), jax.block_until_ready, _committed)
PLACEMENTS = {"device": ON_DEVICE, "host": ON_HOST}
"""Map from a value of `optimizer.offload` to its placement."""


class Memory(NamedTuple):
    """The two choices that decide a run's memory: placement of moments, and rematerialization.

    Attributes:
      moments: placement of the optimizer state.
      remat: key of `decoder.REMAT`; names which values of a layer are saved for the backward pass.
    """

    moments: Placement
    remat: str


def memory_of(config: Config) -> Memory:
    """Returns the memory choices of a config; without a memory plan, auto means device and dots."""
    offload, remat = config.optimizer.offload, config.model.remat
    return Memory(
        PLACEMENTS["device" if offload == "auto" else offload],
        "dots" if remat == "auto" else remat,
    )
