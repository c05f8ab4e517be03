"""Tests optional engines, if their package is installed, and populations."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

Sweep = Callable[..., Any]
POPULATION = """population=Population(
        run=lambda cells, context: [together(cell, len(cells)) for cell in cells],
        key=lambda cell: cell["method"] if cell["rank"] < 64 else None, largest=3))

def together(cell, size):
    with open(RAN / "together", "a") as file:
        file.write(f"{cell['method']}{size} ")
    if cell["rank"] == 16 and cell["seed"] == 0:
        return ValueError("diverged")
    return {"loss": 1.0, "size": size}

(1
"""


def test_cells_of_a_population_run_together_and_are_recorded_apart(toy: Any, sweep: Sweep) -> None:
    toy.write(more=POPULATION)
    ended = sweep()
    assert ended.code == 1, ended.err
    assert sorted((toy.folder / "together").read_text().split()) == ["lora3"] * 3 + ["qlora3"] * 3
    assert len(toy.runs()) == 2  # one cell of each method ran outside the population
    records = [json.loads(x) for x in (toy.out / "results.jsonl").read_text().splitlines()]
    failed = [r for r in records if r["status"] == "failed"]
    assert [(r["values"]["rank"], r["values"]["seed"]) for r in failed] == [(16, 0)] * 2
    assert {r["error"] for r in failed} == {"ValueError: diverged"}
    shared = [r for r in records if r["rows"] and r["rows"][0].get("size") == 3]
    assert len(shared) == 4
    assert shared[0]["wall_s"] == shared[1]["wall_s"]


@pytest.mark.parametrize(
    ("engine", "package", "extra"), [("ray", "ray", "ray"), ("slurm", "submitit", "slurm")]
)
def test_an_engine_whose_package_is_missing(
    toy: Any, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, engine: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    ended = sweep("--engine", engine)
    assert ended.code == 2
    assert f"--engine {engine}: {package} is not installed; pip install 'qlora-jax[{extra}]'" in (
        ended.message
    )


def test_ray_runs_the_same_cells(toy: Any, sweep: Sweep) -> None:
    pytest.importorskip("ray")
    toy.write("if cell['rank'] == 16 and cell['seed']: os.kill(os.getpid(), 9)")
    ended = sweep("--engine", "ray", "--jobs", "2", "--resource", "num_cpus=1")
    check(toy, ended)


def test_slurm_runs_the_same_cells(toy: Any, sweep: Sweep) -> None:
    pytest.importorskip("submitit")
    toy.write("if cell['rank'] == 16 and cell['seed']: os.kill(os.getpid(), 9)")
    ended = sweep("--engine", "slurm", "--resource", "cluster=local", "--resource", "timeout_min=2")
    check(toy, ended)


def check(toy: Any, ended: Any) -> None:
    assert ended.code == 1, ended.err
    records = [json.loads(x) for x in (toy.out / "results.jsonl").read_text().splitlines()]
    states = [r["status"] for r in records]
    assert (states.count("done"), states.count("failed"), states.count("skipped")) == (6, 2, 4)
    assert len(set(toy.runs())) == len(toy.runs()) == 6
    assert all("died" in r["error"] for r in records if r["status"] == "failed")
