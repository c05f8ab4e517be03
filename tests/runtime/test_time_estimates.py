"""Checks time estimates against sums by hand and the figures in docs/benchmarks.md."""

import re
from pathlib import Path

import pytest

from qlora_jax.runtime import time_estimates

BENCHMARKS = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
SMOLLM2 = 134_515_008
"""Number of parameters of SmolLM2-135M, from the shapes in its model card."""


def test_a_time_is_the_sum_of_its_phases(monkeypatch):
    monkeypatch.setattr(time_estimates, "SECONDS", {"once": 2.0, "each": 0.5})
    monkeypatch.setattr(
        time_estimates,
        "PHASES",
        {"a": [("once",), ("each", "rows", "ways")], "b": [("each", "rows")]},
    )
    assert time_estimates.seconds(["a"], {"rows": 10, "ways": 3}) == 17
    assert time_estimates.seconds(["a", "b"], {"rows": 10, "ways": 3}) == 22
    assert time_estimates.line(["a", "b"], rows=10, ways=3) == (
        "a: about 22 s on 2 CPU cores (an estimate)"
    )
    assert time_estimates.line(["b"], rows=10) is None


def test_every_phase_has_a_rate():
    rates = {rate for phases in time_estimates.PHASES.values() for rate, *_ in phases}
    assert rates == time_estimates.SECONDS.keys()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (42.4, "42 s"), (180, "3 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_about(seconds, text):
    assert time_estimates.about(seconds) == text


def test_rates_agree_with_what_was_measured():
    """The estimates agree within a factor of two with the rates documented for the same machine."""
    (step,) = re.findall(r"training step, SmolLM2.* / (\d+) tokens/s, 1\.56x", BENCHMARKS)
    (written,) = re.findall(r"generation in NF4.* / (\d+) tokens/s", BENCHMARKS)
    for rate, per_second in (("train", step), ("token", written)):
        ratio = time_estimates.SECONDS[rate] * SMOLLM2 * float(per_second)
        assert 0.5 < ratio < 2, rate
