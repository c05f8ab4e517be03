"""Computes means and paired differences with confidence intervals, and judges claims by them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000

AGREES, CONTRADICTS, UNDECIDED = "agrees", "contradicts", "undecided"


class Interval(NamedTuple):
    """A mean and its confidence interval, in the unit of the averaged values.

    Attributes:
      mean: mean of the sample.
      low: lower end of the interval; minus infinity for a single value.
      high: upper end of the interval; infinity for a single value.
      size: number of values in the sample.
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
    """Returns the mean of independent values, with its confidence interval.

    Args:
      values: sample of at least one value, all finite.
      level: confidence level.
      method: "t" is Student's interval, exact for normally distributed values and suitable for a
        few seeds. "bootstrap" takes the percentiles of resampled means; it suits many values of an
        unknown distribution, and is too narrow for fewer than about ten values.

    Raises:
      ValueError: there are no values, or a value is not finite.
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
    """Returns the mean of a - b over pairs, with its confidence interval.

    The two values of a pair have everything in common, such as the seed, except for the property
    that is compared.

    Raises:
      ValueError: the lists have different lengths, or `mean` fails.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    pairs = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return mean(pairs.tolist(), level=level, method=method)


def within(interval: Interval, low: float = -np.inf, high: float = np.inf) -> str:
    """Judges the claim that the true value is in [low, high], by a confidence interval.

    Returns:
      `agrees` if the whole interval is in [low, high], `contradicts` if no part of it is, else
      `undecided`.
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
