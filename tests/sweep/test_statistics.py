"""Checks intervals against published tables, closed forms and their coverage."""

import numpy as np
import pytest

from qlora_jax.sweep.statistics import Interval, difference, mean, within

STUDENT = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262, 30: 2.045}
"""Sample size to the two-sided 95% quantile of Student's t, from published tables."""


@pytest.mark.parametrize("count", STUDENT)
def test_the_t_interval_is_the_table_s(count: int) -> None:
    sample = np.random.default_rng(count).normal(3, 2, count)
    found = mean(sample.tolist())
    half = STUDENT[count] * sample.std(ddof=1) / np.sqrt(count)
    assert found.mean == pytest.approx(sample.mean())
    ends = (found.mean - found.low, found.high - found.mean)
    assert ends == pytest.approx((half, half), rel=3e-4)
    assert found.size == count


def test_the_t_interval_of_three_seeds_covers() -> None:
    random = np.random.default_rng(0)
    hits = [m.low <= 1 <= m.high for m in (mean(random.normal(1, 1, 3)) for _ in range(2000))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_the_bootstrap_of_many_values_covers() -> None:
    random = np.random.default_rng(0)
    samples = random.exponential(1, (300, 60))
    hits = [m.low <= 1 <= m.high for m in (mean(x, method="bootstrap") for x in samples)]
    assert 0.88 < np.mean(hits) < 0.98


def test_pairs_take_out_what_they_have_in_common() -> None:
    random = np.random.default_rng(0)
    common, noise = random.normal(0, 10, 5), random.normal(0, 0.1, 5)
    found = difference((common + 0.5 + noise).tolist(), common.tolist())
    assert found == mean((0.5 + noise).tolist()) or found.mean == pytest.approx(0.5 + noise.mean())
    assert 0 < found.low < 0.5 < found.high < 1


def test_one_value_says_nothing() -> None:
    found = mean([2.0])
    assert (found.mean, found.low, found.high) == (2, -np.inf, np.inf)
    assert within(found, -100, 100) == "undecided"
    assert str(found) == "2 (one value)"


@pytest.mark.parametrize(
    ("ends", "bounds", "expected"),
    [
        ((-1, 1), (-2, 2), "agrees"),
        ((-1, 1), (-1, 1), "agrees"),
        ((-1, 3), (-2, 2), "undecided"),
        ((2.5, 3), (-2, 2), "contradicts"),
        ((-4, -3), (-2, 2), "contradicts"),
        ((0.1, 9), (0, np.inf), "agrees"),
        ((-9, -0.1), (0, np.inf), "contradicts"),
        ((-1, 1), (0, np.inf), "undecided"),
    ],
)
def test_within(ends: tuple[float, float], bounds: tuple[float, float], expected: str) -> None:
    assert within(Interval(sum(ends) / 2, *ends, 3), *bounds) == expected


def test_values_that_have_no_mean() -> None:
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            mean(values)
    with pytest.raises(ValueError, match="paired"):
        difference([1.0], [1.0, 2.0])
