"""Tests which cells remain and how long they take, against sums by hand on a toy experiment."""

import json
from pathlib import Path

import pytest

from qlora_jax.runtime import manifest
from qlora_jax.runtime.device import cpu_cores, cpu_name
from qlora_jax.sweep import Estimate, Experiment, Population
from qlora_jax.sweep.cost import sentence, time_of, total_cost_text, work
from qlora_jax.sweep.find import where
from qlora_jax.sweep.record import DONE, FAILED

HERE = {"cpu": cpu_name(), "cores": cpu_cores()}
SECONDS = {"small": 10, "large": 100}


def experiment(**more):
    return Experiment(
        name="made",
        question="?",
        paper="-",
        expected="-",
        cost="2 CPU cores",
        axes={"model": ["small", "large", "huge"], "rank": [1, 2]},
        seeds=(0, 1),
        run=lambda cell, context: {},
        analyse=lambda table: None,
        **more,
    )


def by_model(cell):
    known = SECONDS.get(cell["model"])
    return None if known is None else Estimate(known, 2**30)


def keep(folder: Path, made: Experiment, cells, wall_s, machine=HERE, status=DONE, earlier=()):
    """Writes results as if the given cells had ended."""
    head = {"format": 1, "experiment": made.name, "version": made.version, "rows": []}
    with (folder / "results.jsonl").open("a") as file:
        for cell in cells:
            own = {"id": cell.id, "values": cell.values, "status": status, "error": ""}
            file.write(json.dumps(head | own | {"wall_s": wall_s, "versions": {}}) + "\n")
    told = {"machine": machine, "earlier": [{"machine": one} for one in earlier]}
    (folder / manifest.NAME).write_text(json.dumps(told))


def expected(made, cells, out, jobs=1, retry_failed=False):
    return time_of(made, work(made, cells, out, retry_failed), out, jobs)


def test_the_estimate_is_of_the_chosen_cells(tmp_path):
    made = experiment(estimate=by_model)
    all_cells = made.cells()
    some = where(all_cells, ["model=small"])
    assert expected(made, some, tmp_path)[:3] == (40, 2**30, 0)
    found = expected(made, all_cells, tmp_path)
    assert found[:] == (440, 2**30, 0, 8, 4)
    assert found.source == "declared"
    assert sentence(found) == (
        "time: about 7 min, 1.0 GiB, by the experiment's own estimate, not measured on this "
        "machine; without 4 cells of unknown time"
    )
    assert total_cost_text(made) == "12 cells; 2 CPU cores"
    assert list(tmp_path.iterdir()) == []


def test_finished_cells_of_a_kind_count_for_the_rest_of_it(tmp_path):
    made = experiment(estimate=by_model)
    cells = made.cells()
    keep(tmp_path, made, where(cells, ["model=small", "seed=0"]), 30.0)
    found = expected(made, cells, tmp_path)
    assert found[:] == (2 * 30 + 400, 2**30, 2, 4, 4)
    assert found.source == "measured and declared"
    assert "measured on this machine (2 cells) and the experiment's own" in sentence(found)
    some = expected(made, where(cells, ["model=small"]), tmp_path)
    assert some[:] == (60, 2**30, 2, 0, 0)
    assert sentence(some) == (
        "time: about 60 s, 1.0 GiB, by finished cells of their kind, measured on this machine"
    )


@pytest.mark.parametrize(
    "where_it_ran", [{"machine": {"cpu": "i386", "cores": 1}}, {"earlier": [{}]}]
)
def test_times_of_another_machine_do_not_count(tmp_path, where_it_ran):
    made = experiment(estimate=by_model)
    cells = where(made.cells(), ["model=small"])
    keep(tmp_path, made, cells[:1], 30.0, **where_it_ran)
    assert expected(made, cells, tmp_path)[:] == (30, 2**30, 0, 3, 0)


def test_without_an_estimate_all_cells_are_of_one_kind(tmp_path):
    made = experiment()
    cells = made.cells()
    found = expected(made, cells, tmp_path)
    assert found[:] == (0, 0, 0, 0, 12)
    assert found.source is None
    assert sentence(found).startswith("time: not known; no such cell is finished here")
    keep(tmp_path, made, cells[:2], 5.0)
    assert expected(made, cells, tmp_path)[:] == (50, 0, 10, 0, 0)


def test_a_group_with_an_unfinished_cell_is_counted_whole(tmp_path):
    population = Population(lambda cells, context: [], lambda c: (c["model"], c["rank"]), largest=2)
    made = experiment(estimate=by_model, population=population)
    cells = where(made.cells(), ["model=small"])
    keep(tmp_path, made, cells[:1], 30.0)
    found = work(made, cells, tmp_path)
    assert len(found.left) == 3
    assert [len(task) for task in found.tasks] == [2, 2]
    assert expected(made, cells, tmp_path)[:] == (120, 2**30, 4, 0, 0)
    keep(tmp_path, made, cells[1:2], 30.0)
    assert [cell.id for cell in work(made, cells, tmp_path).running] == [c.id for c in cells[2:]]


def test_failed_cells_count_where_they_run_again(tmp_path):
    made = experiment(estimate=by_model)
    cells = where(made.cells(), ["model=small"])
    keep(tmp_path, made, cells, 1.0, status=FAILED)
    assert expected(made, cells, tmp_path)[:] == (0, 0, 0, 0, 0)
    assert expected(made, cells, tmp_path, retry_failed=True)[:] == (40, 2**30, 0, 4, 0)


def test_several_at_a_time_take_at_least_as_long_as_the_longest(tmp_path):
    made = experiment(estimate=by_model)
    cells = where(made.cells(), ["model=small,large", "rank=1", "seed=0"])
    assert expected(made, cells, tmp_path, jobs=2)[:2] == (100, 2 * 2**30)
    assert "about 2 min at best, 8 at a time" in sentence(expected(made, cells, tmp_path, 8), 8)


def test_the_plan_tells_states_and_time(tmp_path, toy, sweep):
    toy.write(more="estimate=lambda cell: __import__('qlora_jax').sweep.Estimate(90, 2**30),")
    ended = sweep("--dry-run", "--where", "rank=8,4096")
    assert ended.code == 0, ended.err
    assert (
        "8 cells chosen: 4 skipped, 4 to run\ntime: about 6 min, 1.0 GiB, by the exp" in ended.out
    )
    assert "the whole experiment: 8 cells, about 12 min by its own estimate; seconds" in ended.out
    told = json.loads(sweep("--dry-run", "--json").out)
    figures = ("chosen", "done", "skipped", "to_run", "again", "seconds", "seconds_from")
    assert [told[key] for key in figures] == [12, 0, 4, 8, 0, 720, "declared"]
    assert toy.runs("began") == []
