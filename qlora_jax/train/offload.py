"""Stands in for paged optimizers (QLoRA, section 3): moments on the host visit the device in turn.

A driver moves the pages of a paged optimizer between the memories when the device is full. Here the
program moves the moments itself, a unit of the trained tree (`layer_groups`) at a time: a unit's come to
the device for its update and go back, while the next unit's are on their way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from qlora_jax.config import Config


class Placement(NamedTuple):
    """A home for moments.

    Attributes:
      store: a tree on the device to the same tree at home.
      fetch: the way back; returns before the copy is done.
      wait: until a tree has arrived at home. A caller that does not wait would have the moments
        of all layers on their way at one time.
      begin: prepares the state before the first step. With moments on the host it commits every
        array to its device. Moments that come from the host are committed, so the arrays of all
        later states are too, and jit compiles a program once for each of the two kinds.
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
"""A setting `optimizer.offload` to the placement it stands for."""


class Memory(NamedTuple):
    """What a run keeps, and where.

    Attributes:
      moments: where the optimizer's state lives.
      remat: a key of `decoder.REMAT`, what of the layers is kept for the backward pass.
    """

    moments: Placement
    remat: str


def memory_of(config: Config) -> Memory:
    """Returns what a config asks for; auto is the device, and dots, since there is no plan."""
    offload, remat = config.optimizer.offload, config.model.remat
    return Memory(
        PLACEMENTS["device" if offload == "auto" else offload],
        "dots" if remat == "auto" else remat,
    )
