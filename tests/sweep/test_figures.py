"""Tests figures and columns: the measurements of a cell and their display in a table."""

import pytest

from qlora_jax.runtime.errors import RunFailed
from qlora_jax.sweep import Table, markdown
from qlora_jax.sweep.metrics import Metric, average, columns, first, interval, line, lines, measured

METRICS: dict[str, Metric[str]] = {
    "length": Metric(len, "letters", average),
    "kept": Metric(str.upper),
    "vowels": Metric(lambda word: sum(letter in "aeiou" for letter in word), "vowels [95%]"),
}
ROWS = Table(
    {"rank": rank, "seed": seed, **measured(METRICS, word)}
    for rank, seed, word in [(8, 0, "adapter"), (8, 1, "base"), (16, 0, "rank")]
)


def test_what_is_measured_keeps_the_order() -> None:
    assert measured(METRICS, "adapter") == {"length": 7, "kept": "ADAPTER", "vowels": 3}
    assert list(measured(METRICS, "")) == list(METRICS)


def test_a_metric_with_a_title_is_a_column() -> None:
    assert list(columns(METRICS)) == ["letters", "vowels [95%]"]
    assert list(columns(METRICS, leading=["vowels"])) == ["vowels [95%]", "letters"]
    assert lines(ROWS, ["rank"], columns(METRICS)) == [
        {"rank": 8, "letters": 5.5, "vowels [95%]": "2.5 [-3.853, 8.853], n = 2"},
        {"rank": 16, "letters": 4.0, "vowels [95%]": "1 (one value)"},
    ]


def test_one_entry_adds_a_metric_to_rows_and_table() -> None:
    more = {**METRICS, "last": Metric(lambda word: word[-1], "last letter", first)}
    assert measured(more, "rank")["last"] == "k"
    new = Table([*ROWS.rows, {"rank": 32, "seed": 0, **measured(more, "lora")}])
    shown = lines(new, ["rank"], columns(more))
    assert [one["last letter"] for one in shown] == [None, None, "a"]
    assert markdown(shown).startswith("| rank | letters | vowels [95%] | last letter |")


def test_rows_from_before_a_metric_are_left_out_of_its_column() -> None:
    old = {"rank": 8, "seed": 2}
    mixed = Table([old, *ROWS.where(rank=8).rows])
    assert line(mixed, columns(METRICS))["letters"] == 5.5
    assert line(Table([old]), columns(METRICS)) == {"letters": None, "vowels [95%]": None}


def test_a_column_of_a_figure_that_no_row_has() -> None:
    assert first("none")(ROWS) is None
    for column in (average("none"), interval("none")):
        with pytest.raises(RunFailed, match="no row has none"):
            column(ROWS)
