"""The blocks of the attention kernels, as data."""

from collections.abc import Mapping
from typing import NamedTuple

from qlora_jax.kernels.target import Capability


class Block(NamedTuple):
    """One step of a kernel's loop: so many queries against so many keys.

    Attributes:
      queries, keys: powers of two; 16 is the least that tensor cores take.
      warps: the number of warps, of 32 threads each.
      stages: the depth of the compiler's software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """The three kernels: the result, the gradients of keys and values, those of queries."""

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
"""Compute capability (and those above, up to the next) to the most features of a head to blocks.

Larger ones spill registers, or need more shared memory than a block of threads may have."""


def padded(head_size: int) -> int:
    """Returns the number of features that the kernels compute with: a power of two."""
    return max(16, 1 << (head_size - 1).bit_length())


def blocks_for(capability: Capability | None, head_size: int) -> Blocks:
    """Returns the blocks for a head size on a GPU of this capability.

    Args:
      capability: the GPU's; None, where kernels are interpreted, stands for the oldest GPU.
      head_size: features of a head.
    """
    known = min(BLOCKS) if capability is None else max(c for c in BLOCKS if c <= capability)
    table = BLOCKS[known]
    return table[next(size for size in sorted(table) if padded(head_size) <= size)]
