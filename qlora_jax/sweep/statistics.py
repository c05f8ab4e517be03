"""Means and paired differences with their intervals, and what an interval says of a claim."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000

AGREES, CONTRADICTS, UNDECIDED = "agrees", "contradicts", "undecided"


class Interval(NamedTuple):
    """A mean and its confidence interval, in the unit of what was averaged.

    Attributes:
      mean: of the sample.
      low: end of the interval; minus infinity for a single number.
      high: end of the interval; infinity for a single number.
      size: of the sample.
    """

    mean: float
    low: float
    high: float
    size: int

    def __str__(self) -> str:
        if self.size < 2:
            return f"{self.mean:.4g} (one value)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}], n = {self.size}"


def mean(values: Sequence[float], *, level: float = LEVEL, method: str = "t") -> Interval:
    """The mean of independent values.

    Args:
      values: at least one, all finite.
      level: of confidence.
      method: "t", Student's, exact for normal values and right for a few seeds; "bootstrap", the
        percentiles of resampled means, for many values of no known distribution (of fewer than
        about ten it is too narrow).

    Raises:
      ValueError: no values, or one that is not finite.
    """
    sample = np.asarray(values, np.float64)
    if not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"a mean needs finite values, not {list(values)}")
    center = float(sample.mean())
    if sample.size == 1:
        return Interval(center, -np.inf, np.inf, 1)
    low, high = METHODS[method](sample, level)
    return Interval(center, float(low), float(high), sample.size)


def difference(
    a: Sequence[float], b: Sequence[float], *, level: float = LEVEL, method: str = "t"
) -> Interval:
    """The mean of a - b over pairs that have all but one thing in common, such as their seed.

    Raises:
      ValueError: as `mean`, or lists of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    pairs = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return mean(pairs.tolist(), level=level, method=method)


def within(interval: Interval, low: float = -np.inf, high: float = np.inf) -> str:
    """What an interval says of the claim that the true value lies from `low` to `high`.

    Returns:
      agrees where the whole interval lies there, contradicts where none of it does, else undecided.
    """
    if low <= interval.low and interval.high <= high:
        return AGREES
    return CONTRADICTS if interval.high < low or high < interval.low else UNDECIDED


def _t(sample: np.ndarray, level: float) -> tuple[float, float]:
    half = stats.t.ppf((1 + level) / 2, sample.size - 1) * stats.sem(sample)
    return sample.mean() - half, sample.mean() + half


def _bootstrap(sample: np.ndarray, level: float) -> tuple[float, float]:
    random = np.random.default_rng(0)
    means = random.choice(sample, (RESAMPLES, sample.size)).mean(axis=1)
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


METHODS: Mapping[str, Callable[[np.ndarray, float], tuple[float, float]]] = {
    "t": _t,
    "bootstrap": _bootstrap,
}
