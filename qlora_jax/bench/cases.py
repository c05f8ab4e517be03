"""What `bench kernels` times, on every side: operations, shapes, dtypes and input buffers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.bench.options import Kernels

BLOCK_SIZE = 64
CODEBOOK = "nf4"
BEYOND_CACHES = 256 * 2**20
"""Bytes that one round over a case's inputs touches, so that no cache holds them."""

MOST_COPIES = 64
"""Of inputs; the weights that these do not stretch to `BEYOND_CACHES` are tiny."""

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
BY_DEVICE = {
    "cpu": Kernels(((4096, 4096),), (1, 16, 512, 2048), ("bfloat16", "float32")),
    "gpu": Kernels(((4096, 4096), (4096, 11008)), (1, 16, 512, 2048, 8192), ("bfloat16",)),
}


class Case(NamedTuple):
    """One operation on a weight W [k, n] in blocks of 64.

    Attributes:
      operation: quantize (from `dtype`), dequantize (to `dtype`), forward (x @ W) or backward
        (g @ W.T), both of operands and results in `dtype`.
      k: in_features.
      n: out_features.
      dtype: see operation.
      rows: of x or g; 0 without one.
      double: whether the scales are quantized, too.
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
        """How many sets of input buffers take turns."""
        return min(max(2, math.ceil(BEYOND_CACHES / self._nbytes)), MOST_COPIES)

    @property
    def _nbytes(self) -> int:
        weight, codes = self.k * self.n * ITEMSIZE[self.dtype], self.k * self.n // 2
        operands = self.rows * (self.k + self.n) * ITEMSIZE[self.dtype]
        return codes + (operands if self.rows else weight)

    def weight(self) -> np.ndarray:
        """float32[k, n], the same on every side."""
        return np.random.default_rng(0).standard_normal((self.k, self.n), np.float32)

    def operand(self) -> np.ndarray:
        """x, or g of the backward pass: float32[rows, k or n]."""
        shape = (self.rows, self.n if self.operation == "backward" else self.k)
        return np.random.default_rng(1).standard_normal(shape, np.float32)


def settle(options: Kernels, device: str) -> Kernels:
    """The options with what was left to the device filled in.

    Args:
      options: from the user.
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


def cases(options: Kernels) -> Iterator[Case]:
    """All cases of settled options: those on the weight alone first."""
    return (case for case in _all(options) if case.operation in options.operations)


def _all(options: Kernels) -> Iterator[Case]:
    for k, n in options.shapes:
        for double in (True, False):
            yield Case("quantize", k, n, "float32", double=double)
        for dtype in options.dtypes:
            for double in (True, False):
                yield Case("dequantize", k, n, dtype, double=double)
    for k, n in options.shapes:
        for operation in ("forward", "backward"):
            for dtype in options.dtypes:
                for rows in options.rows:
                    yield Case(operation, k, n, dtype, rows)


def described(case: Case) -> dict[str, Any]:
    """A case as an entry of its figure."""
    return {"case": case._asdict()}
