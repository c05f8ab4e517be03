"""The 4-bit data types: a codebook is sixteen non-decreasing values in [-1, 1].

Quantization divides a block of weights by its absmax and replaces each element by the nearest
value of the codebook, so the sixteen values define the data type completely:

    w' = codebook[code] * absmax,    code = argmin_i |w / absmax - codebook[i]|

To add a data type, add an entry to `CODEBOOKS`.
"""

import functools
from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np

from qlora_jax.runtime.errors import UserError

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat, as in bitsandbytes and in QLoRA, appendix E; `derive_nf4` computes these values."""

AF4_BLOCK64 = (
    -1.0,
    -0.69441008,
    -0.51243739,
    -0.3736951,
    -0.25607552,
    -0.14982478,
    -0.04934812,
    0.0,
    0.04273164,
    0.12934483,
    0.21961274,
    0.31675666,
    0.42563882,
    0.55496234,
    0.72424863,
    1.0,
)
"""AbnormalFloat for blocks of 64 (arXiv 2306.06965): it minimizes the expected absolute error."""


def derive_nf4(offset: float = 0.9677083) -> np.ndarray:
    """Computes NF4 from the quantiles of the normal distribution (QLoRA, section 3).

    With Q the quantile function of N(0, 1), and before the division by the largest value:

        positive values:  Q(offset - i * (offset - 1/2) / 8),   i = 0 ... 7
        zero:             0, which is exact
        negative values: -Q(offset - i * (offset - 1/2) / 7),   i = 0 ... 6

    Equation 4 of the paper, q_i = (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1))) / 2, is not used:
    it does not give the published table. These formulas do.

    Args:
      offset: largest probability; the published table uses (1 - 1/32 + 1 - 1/30) / 2.

    Returns:
      float32[16], ascending; within 1e-6 of `NF4`.
    """
    normal = NormalDist()
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort(np.array([*positive, 0.0, *negative]))
    return (values / values.max()).astype(np.float32)


@functools.cache
def lloyd_max(block_size: int) -> tuple[float, ...]:
    """Returns the codebook of least mean squared error for normal weights.

    Runs the Lloyd-Max iteration on the distribution of t = x / absmax in blocks of `block_size`.
    The distribution is weighted by absmax², because dequantization multiplies an error in t by
    absmax. The values -1, 0 and 1 are fixed.

    Returns:
      16 floats, ascending: seven negative, 0, eight positive.
    """
    t = (np.arange(40000) + 0.5) / 20000 - 1
    density = _scaled_error_density(t, block_size)
    mass, moment = np.cumsum(density), np.cumsum(density * t)
    mass, moment = np.insert(mass, 0, 0.0), np.insert(moment, 0, 0.0)
    pinned = np.array([0, 7, 15])
    values = np.array(NF4)
    for _ in range(5000):
        edges = np.searchsorted(t, np.concatenate([[-1], (values[1:] + values[:-1]) / 2, [1]]))
        updated = np.diff(moment[edges]) / np.diff(mass[edges])
        updated[pinned] = values[pinned]
        if np.abs(updated - values).max() < 1e-9:
            break
        values = updated
    return tuple(float(v) for v in values)


def _scaled_error_density(t: np.ndarray, block_size: int) -> np.ndarray:
    """Returns the density of x / absmax at `t`, weighted by absmax², without x = ±absmax."""
    normal = NormalDist()
    m = np.linspace(0.01, 7.0, 1400)
    inside = np.array([2 * normal.cdf(v) - 1 for v in m])
    weight = inside ** (block_size - 2) * np.exp(-(m**2) / 2) * m**3
    return np.exp(-((t[:, None] * m) ** 2) / 2) @ weight


def _signed(magnitudes: list[float]) -> tuple[float, ...]:
    top = max(magnitudes)
    return tuple(sorted(s * v / top for v in magnitudes for s in (-1, 1)))


CODEBOOKS: Mapping[str, Callable[[int], tuple[float, ...]]] = {
    "nf4": lambda block_size: NF4,
    "fp4_bnb": lambda block_size: _signed([0, 0.0625, 2, 3, 4, 6, 8, 12]),
    "fp4_e2m1": lambda block_size: _signed([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "fp4_e3m0": lambda block_size: _signed([0, 0.25, 0.5, 1, 2, 4, 8, 16]),
    "int4": lambda block_size: (*(i / 7 for i in range(-7, 8)), 1.0),
    "af4": lambda block_size: AF4_BLOCK64,
    "lloyd": lloyd_max,
}
"""Name to a function from the block size to sixteen values; only `lloyd` depends on the size.

`fp4_bnb` is bitsandbytes' FP4, which differs from E2M1. The three FP4 codebooks contain zero twice.
int4 has fifteen values, so its sixteenth code repeats 1.
"""


def codebook(name: str, block_size: int = 64) -> np.ndarray:
    """Returns the sixteen values of a named data type.

    Args:
      name: a key of `CODEBOOKS`.
      block_size: weights per block, for a codebook that depends on it.

    Returns:
      float32[16], non-decreasing.

    Raises:
      UserError: the name is unknown.
    """
    if name not in CODEBOOKS:
        raise UserError(f"codebook {name!r} is not known; known: {', '.join(CODEBOOKS)}")
    return np.array(CODEBOOKS[name](block_size), np.float32)
