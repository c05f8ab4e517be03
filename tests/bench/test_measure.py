"""Tests the arithmetic of figures, and that a peer's modules need neither jax nor torch."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.bench import measure

ROOT = Path(__file__).parents[2]


def test_take_drops_the_warm_up() -> None:
    count = itertools.count()
    assert measure.take(lambda: float(next(count)), 3) == [1, 2, 3]


def test_median_in_milliseconds() -> None:
    assert measure.median_ms([0.001, 0.1, 0.002]) == {
        "unit": "ms",
        "value": 2,
        "samples": [1, 100, 2],
    }


@pytest.mark.parametrize(
    ("value", "expected"), [(1.23456, 1.235), (0.000123456, 0.0001235), (123456.7, 123457), (0, 0)]
)
def test_rounded(value: float, expected: float) -> None:
    assert measure.rounded(value) == expected


def test_step_figures() -> None:
    figures = measure.step_figures([0.5, 0.25, 1.0], 512)
    assert figures["speed"] == {"unit": "tokens/s", "value": 1024, "samples": [1024, 2048, 512]}
    assert figures["step, median"]["value"] == 500
    assert figures["step, quickest"]["value"] == 250


def test_answer_figures_count_neither_the_prompt_nor_its_token_as_decoding() -> None:
    figures = measure.answer_figures([(0.5, 2.5), (0.25, 4.25), (0.75, 1.75)], 9)
    assert figures["prefill"]["value"] == 500
    # 8 tokens in 2, 4 and 1 seconds give 4, 2 and 8 tokens/s.
    assert figures["decode"] == {"unit": "tokens/s", "value": 4, "samples": [4, 2, 8]}
    assert "decode" not in measure.answer_figures([(0.5, 0.5)], 1)


def test_inputs_and_targets_are_one_token_apart() -> None:
    inputs, targets = measure.inputs_and_targets(50, 2, 8, seed=3)
    assert inputs.shape == targets.shape == (2, 8)
    assert inputs.max() < 50
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(inputs, measure.inputs_and_targets(50, 2, 8, seed=3)[0])
    assert not np.array_equal(inputs, measure.inputs_and_targets(50, 2, 8, seed=4)[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells")
def test_peak_memory_sees_what_was_given_back() -> None:
    memory = measure.PeakMemory()
    before = memory.process()
    # Larger than the memory that earlier tests in this process used at their peak and freed.
    block = np.ones(int(before - (memory.now() or 0) + 128) * 2**17)
    del block
    whole = memory.process()
    assert whole > before + 100
    memory.restart()
    phase = memory.phase()
    assert phase is None or phase < whole - 60
    assert memory.process() >= whole


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux alone tells")
def test_neighbours_do_not_count_this_process() -> None:
    with measure.OtherProcesses() as neighbours:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    assert neighbours.cores is not None
    assert 0 <= neighbours.cores <= measure._cores() + 0.5


def test_a_peer_needs_neither_jax_nor_our_dependencies() -> None:
    """Imports the modules that peers need in a Python that blocks our dependencies."""
    program = f"""
import sys
for name in ("jax", "flax", "torch", "pydantic", "transformers"):
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
import qlora_jax.bench.cases, qlora_jax.bench.measure, qlora_jax.bench.options
import qlora_jax.bench.worker, qlora_jax.bench.tools, qlora_jax.bench.compare
import qlora_jax.bench.table, qlora_jax.bench.peers
"""
    subprocess.run([sys.executable, "-c", program], check=True)
