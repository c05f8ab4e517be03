"""What 4 bits cost a weight: its error, how its codes are used, and whether it is normal."""

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
"""Values that a Shapiro-Wilk test needs, and those up to which its p-values hold (Royston 1995)."""


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """How far decoded values are from the originals.

    Attributes:
      mse: mean of (w - w')².
      relative_mse: sum of (w - w')² over sum of w²; 0 for a weight of zeros.
      largest: max |w - w'|.
    """

    mse: float
    relative_mse: float
    largest: float


def quantization_error(weight: Any, q: QTensor) -> QuantizationError:
    """Compares a weight with what its codes decode to, in float32.

    Args:
      weight: float[..., K, N], what `q` was made of.
      q: its quantized form.

    Raises:
      UserError: another shape.
    """
    if tuple(weight.shape) != q.shape:
        raise UserError(
            f"weight: {list(weight.shape)} is not the shape {list(q.shape)} of its codes"
        )
    squares, energy, largest = map(float, _sums(jnp.asarray(weight), q))
    relative = squares / energy if energy else 0.0
    return QuantizationError(squares / math.prod(q.shape), relative, largest)


def code_counts(q: QTensor) -> np.ndarray:
    """How often each code is used, int64[16]; rows of padding are not counted."""
    codes = np.asarray(q.codes)
    *lead, rows, n = codes.shape
    grouped = codes.reshape(*lead, -1, 32, n)
    whole = np.concatenate([grouped & 15, grouped >> 4], axis=-2).reshape(*lead, 2 * rows, n)
    return np.bincount(whole[..., : q.in_features, :].reshape(-1), minlength=CODES)


def entropy(counts: Any) -> float:
    """Bits per code, -Σ p log2 p: 4 where all sixteen are used alike.

    Args:
      counts: int[n], at least one above zero.
    """
    counts = np.asarray(counts, np.float64)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def normality_rejected(weight: Any, block_size: int | None = None, level: float = 0.05) -> float:
    """Share of output units, or of their blocks, that a Shapiro-Wilk test finds not to be normal.

    Of truly normal values it finds `level`. QLoRA (appendix F) reports 7.5% of the units of LLaMA
    7B at 5%.

    Args:
      weight: float[K, N]; a unit is a column.
      block_size: consecutive values of a column that are tested together; what is left over at its
        end is not. None takes the column, or of a longer one 5,000 values evenly apart.
      level: of significance.

    Raises:
      UserError: fewer than three values to test.
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
    # equal values are as far from normal as can be, and have no statistic
    return (sum(rejected) + int((~spread).sum())) / len(values)


@jax.jit
def _sums(weight: jax.Array, q: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = weight.astype(jnp.float32)
    difference = wide - dequantize(q)
    # in two stages, so that rounding does not grow with the number of values
    squares, energy = ((x**2).sum(axis=-2).sum() for x in (difference, wide))
    return squares, energy, jnp.abs(difference).max()
