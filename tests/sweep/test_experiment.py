"""Tests cells, their ids and groups, and the table for the analysis."""

import random
import re
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.sweep import Analysis, Cell, Experiment, Population, Table, Verdict, markdown
from qlora_jax.sweep.conclude import arranged
from qlora_jax.sweep.find import with_axes
from qlora_jax.sweep.record import DONE, SKIPPED, CellRecord
from qlora_jax.sweep.results import plain, write_parquet
from qlora_jax.sweep.run import groups, unfinished_cells, unfinished_groups

AXES = {"rank": [8, 16], "targets": ["all-linear", ["q_proj", "v_proj"]], "rate": [1e-4]}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)


def declared(**changes: Any) -> Experiment:
    default: dict[str, Any] = {
        "name": "made",
        "question": "q",
        "paper": "p",
        "expected": "e",
        "cost": "c",
        "axes": AXES,
        "run": lambda cell, context: {},
        "analyse": lambda table: Analysis(Verdict("", None, "agrees")),
    }
    return Experiment(**default | changes)


def test_cells_are_the_product_with_every_seed() -> None:
    cells = declared(seeds=(3, 1)).cells()
    assert len(cells) == 8
    assert [c["seed"] for c in cells] == [3, 1] * 4
    assert cells[2].values == {
        "rank": 8,
        "targets": ["q_proj", "v_proj"],
        "rate": 1e-4,
        "seed": 3,
    }
    assert "seed" not in declared(seeds=()).cells()[0].values
    extra = {"rank": 64, "targets": "all-linear", "rate": 1.0}
    assert len(declared(more=[extra, extra]).cells()) == 15


def test_ids_are_known() -> None:
    """The id is from `printf ... | sha256sum`. A changed id would run every finished cell again."""
    cell = declared().cell({"rank": 8, "seed": 0})
    assert cell.id == "206dbd7e5a7f"
    assert declared(version=2).cell({"rank": 8, "seed": 0}).id != cell.id
    assert declared(name="other").cell({"rank": 8, "seed": 0}).id != cell.id


@given(st.dictionaries(st.text(), SCALARS | st.lists(SCALARS), min_size=1), st.randoms())
def test_ids_depend_on_the_values_and_not_on_their_order(
    values: dict[str, Any], order: random.Random
) -> None:
    shuffled = list(values.items())
    order.shuffle(shuffled)
    cell, other = declared().cell(values), declared().cell(dict(shuffled))
    assert cell.id == other.id
    assert re.fullmatch("[0-9a-f]{12}", cell.id)
    assert declared().cell(values | {"more": [values]}).id != cell.id


def test_a_value_changes_the_id_whatever_its_type() -> None:
    values = [1, 1.0, True, "1", None, "None", [1], {"1": 1}]
    assert len({declared().cell({"x": value}).id for value in values}) == len(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": [{"rank": 1}]}, "each must give rank, targets, rate"),
        ({"axes": {"seed": [1]}}, "no axis can be called seed"),
        ({"axes": {"x": [float("nan")]}}, "not JSON compliant"),
        ({"axes": {"x": [np.float32]}}, "not JSON serializable"),
    ],
)
def test_a_grid_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        declared(**changes).cells()


def test_groups_have_equal_keys_and_a_largest_size() -> None:
    cells = [Cell(str(i), {"n": i, "rank": i % 3}) for i in range(12)]
    population = Population(
        run=lambda cells, context: [], key=lambda c: c["rank"] or None, largest=3
    )
    found = groups(cells, population)
    assert sorted(c.id for group in found for c in group) == sorted(c.id for c in cells)
    assert [[c["n"] for c in g] for g in found if g[0]["rank"]] == [
        [1, 4, 7],
        [10],
        [2, 5, 8],
        [11],
    ]
    assert all(len(g) == 1 for g in found if not g[0]["rank"])
    assert groups(cells, None) == [[cell] for cell in cells]


def test_a_sweep_that_goes_on_has_the_groups_of_one_left_alone() -> None:
    cells = [Cell(str(i), {"n": i}) for i in range(7)]
    population = Population(run=lambda cells, context: [], key=lambda c: 1, largest=3)
    skipped = CellRecord("1", cells[1].values, SKIPPED, "too large", [], 0.0, {})
    done = CellRecord("2", cells[2].values, DONE, "", [], 0.0, {})
    records = {record.id: record for record in (skipped, done)}
    waiting = unfinished_cells(cells, records)
    found = unfinished_groups(cells, waiting, records, population)
    assert [[c["n"] for c in group] for group in found] == [[0, 2, 3], [4, 5, 6]]
    finished = {c.id: done._replace(id=c.id) for c in found[0]} | {"1": skipped}
    found = unfinished_groups(cells, unfinished_cells(cells, finished), finished, population)
    assert [[c["n"] for c in group] for group in found] == [[4, 5, 6]]
    alone = unfinished_groups(cells, waiting, records, None)
    assert [[c["n"] for c in group] for group in alone] == [[0], [3], [4], [5], [6]]


ROWS = [
    {"rank": r, "seed": s, "loss": r / 10 + s, "method": m}
    for m in ("qlora", "lora")
    for r in (1, 2)
    for s in (0, 1)
]


def test_a_table_takes_rows_apart() -> None:
    table = Table(ROWS)
    assert table.where(rank=1, method="lora").column("loss") == [0.1, 1.1]
    assert table.values("method") == ["qlora", "lora"]
    found = table.groups("method", "rank")
    assert list(found) == [("qlora", 1), ("qlora", 2), ("lora", 1), ("lora", 2)]
    assert all(len(part) == 2 for part in found.values())
    with pytest.raises(RunFailed, match="no row has los:"):
        table.column("los")


def test_pairs_are_matched_whatever_the_order() -> None:
    shuffled = ROWS[::-1][:-1]  # without (qlora, rank 1, seed 0)
    a, b = Table(shuffled).paired("loss", "rank", 2, 1, by=["method", "seed"])
    assert len(a) == len(b) == 3
    assert [round(x - y, 6) for x, y in zip(a, b)] == [0.1] * 3
    with pytest.raises(RunFailed, match="several rows have rank=2 and equal seed"):
        Table(ROWS).paired("loss", "rank", 2, 1, by=["seed"])
    with pytest.raises(RunFailed, match="no loss to compare between rank=2 and rank=3"):
        Table(ROWS).paired("loss", "rank", 2, 3, by=["seed", "method"])


@given(st.randoms())
def test_records_are_analysed_in_the_order_of_the_axes(order: random.Random) -> None:
    experiment = declared(seeds=(0, 1), more=[{"rank": 64, "targets": "none", "rate": 1.0}])
    cells = experiment.cells()
    records = [CellRecord(cell.id, cell.values, "done", "", [], 0.0, {}) for cell in cells]
    order.shuffle(records)
    assert [record.id for record in arranged(experiment, records)] == [cell.id for cell in cells]


def test_a_record_of_before_an_axis_was_there_comes_last() -> None:
    experiment = declared()
    old, new = (
        CellRecord(name, values, "done", "", [], 0.0, {})
        for name, values in (("old", {"rank": 8}), ("new", experiment.cells()[0].values))
    )
    assert arranged(experiment, [old, new]) == [new, old]


def test_markdown() -> None:
    rows = [{"a": 1, "b": 0.123456}, {"a": None, "c": "x"}]
    assert markdown(rows) == "| a | b | c |\n| --- | --- | --- |\n| 1 | 0.1235 |  |\n|  |  | x |"


def test_figures_become_json() -> None:
    found = plain(
        {"a": np.float32(0.5), "b": np.array(3), "c": [float("inf"), (1, None)], "d": "x\ud800é"}
    )
    assert found == {"a": 0.5, "b": 3, "c": [None, [1, None]], "d": "x\\ud800é"}
    assert type(found["b"]) is int
    with pytest.raises(TypeError, match="ndarray is not a figure"):
        plain(np.zeros(2))


def test_columns_of_several_kinds_are_json_in_parquet(tmp_path: Any) -> None:
    values = [
        {"x": 1, "y": "q", "z": -(2**63), "w": 2**63},
        {"x": 2.5, "y": ["q", "v"], "z": 2, "w": 0.5},
    ]
    records = [
        CellRecord(str(i), v, "done", "", [{"loss": i}], 1.0, {}) for i, v in enumerate(values)
    ]
    write_parquet(tmp_path, records)
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet")
    assert table.column("x").to_pylist() == [1.0, 2.5]
    assert table.column("y").to_pylist() == ['"q"', '["q", "v"]']
    assert table.column("w").to_pylist() == ["9223372036854775808", "0.5"]
    assert table.schema.field("z").type == pyarrow.int64()


def test_an_axis_takes_other_values() -> None:
    extra = {"rank": 64, "targets": "all-linear", "rate": 1.0}
    experiment = with_axes(declared(more=[extra], seeds=()), ["rank=4,32", "targets=all,q_proj"])
    points = [cell.values for cell in experiment.cells()]
    grid = [{"rank": r, "targets": t, "rate": 1e-4} for r in (4, 32) for t in ("all", "q_proj")]
    assert points[:4] == grid
    assert points[4:] == [{**point, "rate": 1.0} for point in grid]


@pytest.mark.parametrize(
    ("setting", "says"),
    [("rank", "write it as AXIS=VALUE"), ("rnak=3", "no such axis; there are: rank, targets")],
)
def test_a_setting_that_is_none(setting: str, says: str) -> None:
    with pytest.raises(UserError, match=f"--set {setting}: .*{says}"):
        with_axes(declared(), [setting])
