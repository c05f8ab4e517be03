"""Measures a 4-bit weight: quantization error, use of the codes, normality of the values."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.quant.qtensor import QTensor, dequantize
from qlora_jax.runtime.errors import UserError

CODES = 16
FEWEST, MOST = 3, 5000
"""Fewest values that a Shapiro-Wilk test needs, and most for which p-values hold (Royston 1995)."""


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """Difference between the original values w and the decoded values w'.

    Attributes:
      mse: mean of (w - w')².
      relative_mse: sum of (w - w')² divided by sum of w²; 0 if all w are 0.
      largest: max |w - w'|.
    """

    mse: float
    relative_mse: float
    largest: float


def quantization_error(weight: Any, q: QTensor) -> QuantizationError:
    """Compares a weight with its decoded 4-bit form, in float32.

    Args:
      weight: original weight, float[..., K, N].
      q: quantized form of `weight`.

    Raises:
      UserError: the shapes differ.
    """
    if tuple(weight.shape) != q.shape:
        raise UserError(
            f"weight has the shape {list(weight.shape)}, but q has {list(q.shape)}; "
            "give the weight that q was made from"
        )
    squares, energy, largest = map(float, _sums(jnp.asarray(weight), q))
    relative = squares / energy if energy else 0.0
    return QuantizationError(squares / math.prod(q.shape), relative, largest)


def code_counts(q: QTensor) -> np.ndarray:
    """Counts how often each code occurs, int64[16]; rows of padding are not counted."""
    codes = np.asarray(q.codes)
    *lead, rows, n = codes.shape
    grouped = codes.reshape(*lead, -1, 32, n)
    whole = np.concatenate([grouped & 15, grouped >> 4], axis=-2).reshape(*lead, 2 * rows, n)
    return np.bincount(whole[..., : q.in_features, :].reshape(-1), minlength=CODES)


def entropy(counts: Any) -> float:
    """Returns the entropy in bits per code, -Σ p log2 p; 4 if all 16 codes are equally frequent.

    Args:
      counts: occurrences of each code, int[n]; at least one is above zero.
    """
    counts = np.asarray(counts, np.float64)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def normality_rejected(weight: Any, block_size: int | None = None, level: float = 0.05) -> float:
    """Returns the share of columns, or of blocks, for which a Shapiro-Wilk test rejects normality.

    If all values are normal, the expected share is `level`. QLoRA (appendix F) reports 7.5% of the
    hidden units of LLaMA 7B at a level of 5%.

    Args:
      weight: weight, float[K, N]; a column holds the weights of one hidden unit.
      block_size: consecutive values of a column that are tested together; values after the last
        whole block are not tested. None tests whole columns; of a column longer than 5,000 it takes
        5,000 evenly spaced values.
      level: significance level of the test.

    Raises:
      UserError: there are fewer than three values per test, or a column has no whole block.
    """
    from scipy import stats

    values = np.asarray(weight, np.float64).T
    if block_size is not None:
        whole = values.shape[1] // block_size * block_size
        values = values[:, :whole].reshape(-1, block_size)
    if values.shape[0] == 0 or values.shape[1] < FEWEST:
        raise UserError(f"a test of normality needs {FEWEST} values or more, not {values.shape[1]}")
    if values.shape[1] > MOST:
        values = values[:, np.linspace(0, values.shape[1] - 1, MOST).astype(int)]
    spread = values.max(1) > values.min(1)
    rejected = [stats.shapiro(row).pvalue < level for row in values[spread]]
    # the statistic is undefined for equal values; they are not normal, so they count as rejected
    return (sum(rejected) + int((~spread).sum())) / len(values)


@jax.jit
def _sums(weight: jax.Array, q: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = weight.astype(jnp.float32)
    difference = wide - dequantize(q)
    # a sum in two stages, so that its rounding error does not grow with the number of values
    squares, energy = ((x**2).sum(axis=-2).sum() for x in (difference, wide))
    return squares, energy, jnp.abs(difference).max()
