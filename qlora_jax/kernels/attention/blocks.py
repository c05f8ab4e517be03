"""The block sizes of the attention kernels, as data."""

from collections.abc import Mapping
from typing import NamedTuple

from qlora_jax.kernels.target import Capability


class Block(NamedTuple):
    """The queries and keys that a kernel processes in one step of its loop, and launch settings.

    Attributes:
      queries: number of queries, a power of two; tensor cores need at least 16.
      keys: number of keys, a power of two of at least 16.
      warps: number of warps, of 32 threads each.
      stages: depth of the compiler's software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """The blocks of the three kernels.

    Attributes:
      forward: block of the kernel that computes the result.
      keys: block of the kernel that computes the gradients of keys and values.
      queries: block of the kernel that computes the gradient of queries.
    """

    forward: Block
    keys: Block
    queries: Block


_AMPERE: Mapping[int, Blocks] = {
    64: Blocks(Block(128, 32, 4, 3), Block(64, 64, 4, 2), Block(64, 64, 4, 2)),
    128: Blocks(Block(128, 64, 8, 2), Block(32, 64, 4, 2), Block(128, 32, 8, 2)),
    256: Blocks(Block(64, 32, 8, 2), Block(32, 32, 8, 2), Block(32, 32, 8, 2)),
}

BLOCKS: Mapping[Capability, Mapping[int, Blocks]] = {
    (8, 0): _AMPERE,
    (9, 0): {
        **_AMPERE,
        256: Blocks(Block(128, 64, 8, 2), Block(32, 32, 8, 2), Block(64, 32, 8, 2)),
    },
    (10, 0): {
        **_AMPERE,
        64: _AMPERE[64]._replace(forward=Block(64, 64, 4, 2)),
    },
}
"""Compute capability, then largest head size, to blocks.

An entry holds for its capability and those above, up to the next entry. Larger blocks spill
registers or need more shared memory than a thread block may have."""


def padded(head_size: int) -> int:
    """Returns the head size padded for the kernels: a power of two of at least 16."""
    return max(16, 1 << (head_size - 1).bit_length())


def blocks_for(capability: Capability | None, head_size: int) -> Blocks:
    """Returns the blocks for a head size on a GPU of this capability.

    Args:
      capability: compute capability of the GPU; None (interpreted kernels) is the oldest GPU.
      head_size: features of a head.
    """
    known = min(BLOCKS) if capability is None else max(c for c in BLOCKS if c <= capability)
    table = BLOCKS[known]
    return table[next(size for size in sorted(table) if padded(head_size) <= size)]
