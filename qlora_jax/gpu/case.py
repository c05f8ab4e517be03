"""Defines a case: one product with a 4-bit weight on one GPU."""

from typing import NamedTuple

from qlora_jax.gpu.described import read_gpu
from qlora_jax.kernels.select import FUSED

DIRECTIONS = ("forward", "backward")
DECODE_FIRST = "xla"
"""The implementation that decodes the weight to memory, then multiplies."""


class GpuProduct(NamedTuple):
    """One product on one GPU; W is in NF4 with double quantization.

    `direction` is forward, x @ W with x [rows, k], or backward, g @ W.T with g [rows, n].
    """

    gpu: str
    implementation: str
    rows: int
    k: int
    n: int
    dtype: str
    direction: str

    @property
    def inner(self) -> int:
        return self.k if self.direction == "forward" else self.n

    @property
    def outer(self) -> int:
        return self.n if self.direction == "forward" else self.k


def tile(case: GpuProduct) -> tuple[int, int]:
    """Returns the rows and columns of the result that one block of a fused kernel computes."""
    return FUSED[case.implementation].tile(
        case.rows,
        case.dtype,
        case.inner,
        case.outer,
        case.direction,
        read_gpu(case.gpu).capability,
    )
