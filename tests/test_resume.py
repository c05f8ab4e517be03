"""A run that is stopped, killed and resumed equals an uninterrupted run, bit for bit."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.tools import kill_resume
from qlora_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = 40
LEFT_OUT = ("train/seconds", "train/tokens_per_s")
"""Metrics of time: the only ones that may differ."""


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    """The module experiments/tools/kill_resume.py, which interrupts and resumes any config."""
    return kill_resume


class Runs(NamedTuple):
    """An uninterrupted run and an interrupted one; `hits` lists the interruptions."""

    whole: Path
    killed: Path
    hits: list[Any]


@pytest.fixture(scope="module")
def runs(
    experiment: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    config = write_config(
        folder,
        lora__dropout=0.1,
        data__packing=True,
        optimizer__schedule="cosine",
        train__steps=STEPS,
        train__batch_size=2,
        train__gradient_accumulation=2,
        train__eval_every=6,
        train__save_every=4,
    )
    whole, killed = folder / "whole", folder / "killed"
    ended = run_cli("train", config, f"--output={whole}")
    assert ended.code == 0, ended.err
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trial = experiment.Trial(config, environment=environment)
    moments = [
        experiment.Moment(after=2.0),
        experiment.Moment(step=6),
        experiment.Moment(step=11, saving=True),
        experiment.Moment(step=17, number=signal.SIGTERM),
        experiment.Moment(step=26, number=signal.SIGINT),
        experiment.Moment(step=STEPS),
    ]
    hits = [trial.hit(killed, moment) for moment in moments]
    trial.finish(killed)
    return Runs(whole, killed, hits)


def state(run: Path, step: int) -> dict[str, np.ndarray]:
    """Returns all arrays of a checkpoint, without `extra`, by name."""
    manager = ocp.CheckpointManager(run / "checkpoints")
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    manager.close()
    return {name: np.asarray(value) for name, value in restored.state.items()}


def figures(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in rows]


def sorting(row: dict[str, Any]) -> tuple[int, bool]:
    return row["step"], "eval/loss" in row


def test_every_signal_came_in_the_middle(runs: Runs) -> None:
    codes = [hit.code for hit in runs.hits]
    killed = -signal.SIGKILL
    assert codes == [killed, killed, killed, 143, 130, killed]
    assert all(hit.sent for hit in runs.hits)
    steps = [hit.step for hit in runs.hits]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-2] < STEPS


def test_a_request_to_stop_saves_the_step_it_reached(runs: Runs) -> None:
    killed, stopped = runs.hits[:3], runs.hits[3:5]
    assert [hit.saved for hit in stopped] == [hit.step for hit in stopped]
    assert any(hit.saved != hit.step for hit in killed)


def test_the_adapter_has_the_same_bytes(runs: Runs, experiment: ModuleType) -> None:
    whole, killed = ((run / experiment.ADAPTER).read_bytes() for run in (runs.whole, runs.killed))
    assert whole == killed


def test_the_last_checkpoint_holds_the_same_state(runs: Runs, experiment: ModuleType) -> None:
    assert experiment.saved_steps(runs.whole) == [STEPS - 4, STEPS]
    assert experiment.saved_steps(runs.killed)[-1] == STEPS
    whole, killed = state(runs.whole, STEPS), state(runs.killed, STEPS)
    assert whole.keys() == killed.keys()
    assert any("adapter.b" in name and name.startswith("trained") for name in whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, killed[name], err_msg=name)


def test_the_figures_are_the_same_and_each_step_is_there_once(runs: Runs) -> None:
    whole, killed = figures(runs.whole), figures(runs.killed)
    assert [r["step"] for r in killed if "train/loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in killed if "eval/loss" in r] == [*range(0, STEPS, 6), STEPS]
    assert sorted(whole, key=sorting) == sorted(killed, key=sorting)


def test_a_damaged_newest_checkpoint_is_left_for_the_one_before(
    runs: Runs, experiment: ModuleType, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    damaged = Path(shutil.copytree(runs.whole, tmp_path / "damaged"))
    newest = damaged / "checkpoints" / str(STEPS)
    data = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(bytes(changed))
    config = runs.whole / "config.yaml"
    shutil.rmtree(damaged / "adapter")  # with an adapter the run would be finished
    ended = run_cli("train", config, f"--output={damaged}", "--resume")
    assert ended.code == 0, ended.err
    before = STEPS - 4
    assert f"/{STEPS}: damaged: " in ended.err
    assert (
        f"step {before} is used instead, and the damaged one was renamed to damaged-{STEPS}"
        in ended.err
    )
    assert f"resumed from step {before}" in ended.err
    assert (damaged / experiment.ADAPTER).read_bytes() == (
        runs.whole / experiment.ADAPTER
    ).read_bytes()
    assert experiment.saved_steps(damaged)[-1] == STEPS


def test_resuming_a_finished_run_says_so(
    runs: Runs, experiment: ModuleType, run_cli: Callable[..., Any]
) -> None:
    before = (runs.whole / experiment.ADAPTER).read_bytes(), figures(runs.whole)
    ended = run_cli("train", runs.whole, "--resume", "--json")
    assert ended.code == 0, ended.err
    assert f"finished at step {STEPS}; give --train.steps=M to go on" in ended.err
    assert "loading" not in ended.err
    after = (runs.whole / experiment.ADAPTER).read_bytes(), figures(runs.whole)
    assert before == after
    summary = json.loads(ended.out)
    assert summary["steps"] == STEPS
    assert summary["tokens_per_s"] > 0
    assert summary["eval_before"] == before[1][0]["eval/loss"]


def test_moments_on_the_host_survive_kills(
    experiment: ModuleType,
    tmp_path: Path,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
) -> None:
    config = write_config(tmp_path, optimizer__offload="host", train__steps=12, train__save_every=3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = run_cli("train", config, f"--output={whole}")
    assert ended.code == 0, ended.err
    trial = experiment.Trial(config, environment=os.environ | {"PYTHONPATH": str(ROOT)})
    moments = [experiment.Moment(step=4), experiment.Moment(step=8, saving=True)]
    hits = [trial.hit(killed, moment) for moment in moments]
    assert [hit.code for hit in hits] == [-signal.SIGKILL] * 2
    assert all(0 < hit.saved < 12 for hit in hits)
    trial.finish(killed)
    adapters = [(run / experiment.ADAPTER).read_bytes() for run in (whole, killed)]
    assert adapters[0] == adapters[1]
    last = [state(run, 12) for run in (whole, killed)]
    assert last[0].keys() == last[1].keys()
    for name, value in last[0].items():
        np.testing.assert_array_equal(value, last[1][name], err_msg=name)
    rows = [row for row in read_metrics(killed / "metrics.jsonl") if "train/loss" in row]
    assert all(row["train/moments_moved_mb"] > 0 for row in rows)


def test_the_experiments_moments_leave_room_for_all_kills(experiment: ModuleType) -> None:
    for seed in range(50):
        rng = experiment.random.Random(seed)
        reached = 0
        for left in range(5, 0, -1):
            moment = experiment.choose(rng, reached, 60, left, 10.0)
            assert moment.after < 10
            assert moment.step <= 60
            assert bool(moment.after) != bool(moment.step)
            reached = max(reached, moment.step - 1)
