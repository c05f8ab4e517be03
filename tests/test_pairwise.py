"""The pairwise sample: its rows hold every allowed pair of choices, and no forbidden one."""

import importlib.util
import itertools
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "parity" / "matrix" / "pairwise.py"
SPEC = importlib.util.spec_from_file_location("matrix_pairwise", SOURCE)
pairwise = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pairwise)

AXES = {"a": ["1", "2", "3"], "b": ["x", "y"], "c": ["p", "q", "r", "s"], "d": ["0", "1"]}
RULES = ({"a": ("2",), "c": ("q", "r")},)


@pytest.mark.parametrize("seed", range(5))
def test_every_pair_that_may_be_is_in_a_row(seed):
    rows = pairwise.pairwise(AXES, 1000, seed, RULES)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(AXES, 2)
        for x, y in itertools.product(AXES[a], AXES[b])
        if not (a == "a" and x == "2" and b == "c" and y in "qr")
    }
    assert {pair for row in rows for pair in itertools.combinations(row.items(), 2)} == wanted
    assert len(rows) < 3 * 2 * 4 * 2
    assert rows[0] == {"a": "1", "b": "x", "c": "p", "d": "0"}
    assert rows == pairwise.pairwise(AXES, 1000, seed, RULES)


def test_choices_apart_are_tried_alone():
    rows = pairwise.sample(AXES, {("c", "s"), ("d", "1")}, 1000, 1, ())
    apart = [row for row in rows if row["c"] == "s" or row["d"] == "1"]
    assert apart == [
        {"a": "1", "b": "x", "c": "s", "d": "0"},
        {"a": "1", "b": "x", "c": "p", "d": "1"},
    ]
    assert pairwise.describe(apart[0], rows[0]) == "c s"


def test_a_short_sample_has_every_choice():
    rows = pairwise.pairwise(AXES, 4, 1)
    assert len(rows) == 4
    assert {pair for row in rows for pair in row.items()} == {
        (axis, choice) for axis, choices in AXES.items() for choice in choices
    }
