"""Lists the cases that `bench kernels` times: operations, shapes, dtypes and input buffers.

Imports neither jax nor torch.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.bench import measure
from qlora_jax.bench.measure import Figure
from qlora_jax.bench.options import KernelOptions

BLOCK_SIZE = 64
NESTED_BLOCK = 256
CODEBOOK = "nf4"
BEYOND_CACHES = 256 * 2**20
"""Least bytes of all input sets of a case together, so that no cache holds them."""

MOST_COPIES = 64
"""Largest number of input sets; only tiny weights stay below `BEYOND_CACHES` with so many."""

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
BY_DEVICE = {
    "cpu": KernelOptions(((4096, 4096),), (1, 16, 512, 2048), ("bfloat16", "float32")),
    "gpu": KernelOptions(
        ((4096, 4096), (4096, 11008), (8192, 28672)),
        (1, 4, 16, 64, 512, 2048, 8192),
        ("bfloat16",),
    ),
}


class OperationCase(NamedTuple):
    """One timed operation on a weight W [k, n] with block_size 64.

    Attributes:
      operation: quantize (from `dtype`), dequantize (to `dtype`), forward (x @ W) or backward
        (g @ W.T); operands and results of both products have `dtype`.
      k: in_features.
      n: out_features.
      dtype: dtype of all floats; see `operation`.
      rows: rows of x or g; 0 if the operation has neither.
      double: whether the scales are quantized too.
    """

    operation: str
    k: int
    n: int
    dtype: str
    rows: int = 0
    double: bool = True

    @property
    def name(self) -> str:
        rows = f", M={self.rows}" if self.rows else ""
        scales = "" if self.double else ", plain scales"
        return f"{self.operation} {self.k}x{self.n}{rows}, {self.dtype}{scales}"

    @property
    def copies(self) -> int:
        """Returns the number of input sets that take turns."""
        return min(max(2, math.ceil(BEYOND_CACHES / self.nbytes())), MOST_COPIES)

    def nbytes(self, quantized: bool = True) -> int:
        """Returns the bytes of operands and result, each counted once.

        Args:
          quantized: whether a product's weight is in 4 bits; else it is in `dtype`.
        """
        blocks = self.k * self.n // BLOCK_SIZE
        scales = blocks + 4 * (blocks // NESTED_BLOCK) if self.double else 4 * blocks
        floats, codes = self.k * self.n * ITEMSIZE[self.dtype], self.k * self.n // 2 + scales
        if not self.rows:
            return floats + codes
        operands = self.rows * (self.k + self.n) * ITEMSIZE[self.dtype]
        return operands + (codes if quantized else floats)

    @property
    def flop(self) -> int:
        """Returns the multiplications and additions of a product; 0 for other operations."""
        return 2 * self.rows * self.k * self.n

    @property
    def operand_shape(self) -> tuple[int, int]:
        """Returns the shape of x or, for the backward product, of g."""
        return self.rows, self.n if self.operation == "backward" else self.k

    def weight(self) -> np.ndarray:
        """Returns W, float32[k, n] in host memory, with the same values on every side."""
        return np.random.default_rng(0).standard_normal((self.k, self.n), np.float32)

    def operand(self) -> np.ndarray:
        """Returns x or g, float32 of `operand_shape`, with the same values on every side."""
        return np.random.default_rng(1).standard_normal(self.operand_shape, np.float32)


def settle(options: KernelOptions, device: str) -> KernelOptions:
    """Returns the options with the device's defaults for shapes, rows and dtypes filled in.

    Args:
      options: options of the user.
      device: cpu or gpu.
    """
    default = BY_DEVICE[device]
    return dataclasses.replace(
        options,
        shapes=options.shapes or default.shapes,
        rows=options.rows or default.rows,
        dtypes=options.dtypes or default.dtypes,
        device=device,
    )


def cases(options: KernelOptions) -> Iterator[OperationCase]:
    """Returns all cases of settled options; those without x or g come first."""
    return (case for case in _all(options) if case.operation in options.operations)


def _all(options: KernelOptions) -> Iterator[OperationCase]:
    for k, n in options.shapes:
        for double in (True, False):
            yield OperationCase("quantize", k, n, "float32", double=double)
        for dtype in options.dtypes:
            for double in (True, False):
                yield OperationCase("dequantize", k, n, dtype, double=double)
    for k, n in options.shapes:
        for operation in ("forward", "backward"):
            for dtype in options.dtypes:
                for rows in options.rows:
                    yield OperationCase(operation, k, n, dtype, rows)


def case_figure(case: OperationCase, seconds: Sequence[float], quantized: bool = True) -> Figure:
    """Returns the median of a case's times as a figure, with its `case` and its rates.

    Args:
      case: timed operation.
      seconds: wall time of each call.
      quantized: whether a product's weight is in 4 bits.

    Returns:
      A figure in ms, with `GB/s` of operands and result (`OperationCase.nbytes`) and, for a
      product, `TFLOP/s`.
    """
    median = statistics.median(seconds)
    rates = {"GB/s": measure.rounded(case.nbytes(quantized) / median / 1e9)}
    if case.flop:
        rates["TFLOP/s"] = measure.rounded(case.flop / median / 1e12)
    return measure.median_ms(seconds) | {"case": case._asdict()} | rates
