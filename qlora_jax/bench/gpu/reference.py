"""Checks products with 4-bit weights against NumPy in float64, computed from the stored bytes.

A product is right if its error is at most twice the error of a 16-bit GEMM on the decoded weight.
That GEMM rounds the weight and its result to 16 bits. Mosaic's kernels round the codebook, the
scale and their product, which gives about 1.4 times the GEMM's error.
"""

from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np

from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import GROUP, QTensor

FACTOR = 2.0
"""Largest allowed error of a product, in units of the GEMM's error."""

SPREADS = 10.0
"""Largest allowed sum of a row's errors with random signs, in standard deviations."""

ALL = 64
"""Largest number of rows for which every row is compared element by element."""

EVERY = 4
"""With more than `ALL` rows, one row in `EVERY` is compared element by element, and all rows by
their sums. A kernel's tile has at least 16 rows."""


def decoded(q: QTensor) -> np.ndarray:
    """Decodes one matrix to float32[K, N], from the layout that `QTensor` documents."""
    codes = np.asarray(q.codes)
    halves = [
        nibbles.reshape(-1, GROUP // 2, codes.shape[1]) for nibbles in (codes & 15, codes >> 4)
    ]
    index = np.concatenate(halves, axis=1).reshape(-1, codes.shape[1])[: q.in_features]
    scales = np.asarray(q.scales)
    if q.nested is not None:
        blocks, columns = scales.shape
        place = np.arange(columns)[None, :] * blocks + np.arange(blocks)[:, None]
        nested = np.asarray(q.nested)[place // q.nested_block]
        scales = np.asarray(dynamic_map())[scales] * nested + np.asarray(q.offset)
    scales = np.repeat(scales.astype(np.float32), q.block_size, axis=0)[: q.in_features]
    return np.asarray(q.codebook)[index] * scales


class ErrorVerdict(NamedTuple):
    """The comparison of a result's error with the error of a 16-bit GEMM.

    Attributes:
      right: whether `mean`, `worst` and `rows` are within their bounds.
      mean: root mean square error, in units of the GEMM's.
      worst: largest error, in units of the GEMM's largest error.
      rows: largest deviation of a row's signed sum over all rows, in standard deviations.
    """

    right: bool
    mean: float
    worst: float
    rows: float

    @property
    def measures(self) -> dict[str, float]:
        """Returns all fields except `right`, by name."""
        return {"mean": self.mean, "worst": self.worst, "rows": self.rows}


def judge(got: np.ndarray, left: np.ndarray, weight: np.ndarray, seed: int) -> ErrorVerdict:
    """Compares a product with the same product in float64.

    Args:
      got: product to check, [M, O] in its dtype.
      left: left operand, [M, C] in the same dtype.
      weight: decoded weight, float32[C, O].
      seed: seed of the choice of rows and signs.
    """
    dtype, source = got.dtype, np.random.default_rng(seed)
    wide, operand = got.astype(np.float64), left.astype(np.float64)
    if not np.isfinite(wide).all():
        return ErrorVerdict(False, np.inf, np.inf, np.inf)
    exact, rounded = weight.astype(np.float64), to_16_bits(weight, dtype).astype(np.float64)
    rows = _some_rows(len(wide), source)
    true = operand[rows] @ exact
    theirs = rounded_to(to_16_bits(left[rows], dtype).astype(np.float64) @ rounded, dtype) - true
    ours = wide[rows] - true
    mean = _ratio(_root_mean_square(ours), _root_mean_square(theirs))
    worst = _ratio(np.abs(ours).max(), np.abs(theirs).max())
    signs = source.choice([-1.0, 1.0], size=wide.shape[1])
    off = np.abs(wide @ signs - operand @ (exact @ signs)).max()
    spread = FACTOR * _root_mean_square(theirs) * np.sqrt(wide.shape[1])
    away = _ratio(off, spread)
    right = mean <= FACTOR and worst <= FACTOR and away <= SPREADS
    return ErrorVerdict(bool(right), *(round(float(x), 3) for x in (mean, worst, away)))


def to_16_bits(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds to the input dtype of a GEMM: `dtype`, or TF32 for float32, as tensor cores do."""
    if dtype != np.float32:
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    even = (bits >> 13) & 1
    return ((bits + 0x0FFF + even) & np.uint32(0xFFFFE000)).view(np.float32)


def rounded_to(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds float64 results to `dtype` through float32, in which a GEMM accumulates."""
    return array.astype(np.float32).astype(dtype).astype(np.float64)


def agree(ours: Any, theirs: Any, exact: Any) -> ErrorVerdict:
    """Compares a result's error with the error of 16-bit GEMMs; both are against float32.

    Args:
      ours: result of the implementation to check.
      theirs: result of decoded weights and 16-bit GEMMs.
      exact: result in float32 at full precision.
    """
    wide = [np.asarray(x).astype(np.float64).ravel() for x in (ours, theirs, exact)]
    if not np.isfinite(wide[0]).all():
        return ErrorVerdict(False, np.inf, np.inf, np.inf)
    own, other = (x - wide[2] for x in wide[:2])
    mean = _ratio(_root_mean_square(own), _root_mean_square(other))
    worst = _ratio(np.abs(own).max(), np.abs(other).max())
    return ErrorVerdict(mean <= FACTOR and worst <= FACTOR, round(mean, 3), round(worst, 3), 0.0)


def _some_rows(count: int, source: np.random.Generator) -> np.ndarray:
    if count <= ALL:
        return np.arange(count)
    starts = np.arange(0, count, EVERY)
    drawn = np.minimum(starts + source.integers(0, EVERY, len(starts)), count - 1)
    return np.unique(np.concatenate([drawn, [0, count - 1]]))


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _ratio(ours: float, theirs: float) -> float:
    return float(ours / theirs) if theirs else (0.0 if not ours else np.inf)
