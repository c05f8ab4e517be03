"""Whole runs that continue with more steps, stop early and export their best step."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.tools import kill_resume
from experiments.tools.kill_resume import ADAPTER, Moment, Trial, saved_steps
from qlora_jax import config as configs
from qlora_jax.runtime import manifest
from qlora_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OVERFITS = {
    "optimizer__learning_rate": 0.1,
    "train__steps": 60,
    "train__eval_every": 2,
    "train__save_every": 5,
    "train__keep_best": True,
    "train__patience": 3,
}
"""Changes that overfit: the held-out loss, on unlike texts, falls and then rises."""


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of texts unlike the training texts, with answers of the same letters."""
    path = tmp_path_factory.mktemp("unlike") / "unlike.jsonl"
    rows = [{"prompt": f"Who is {i}?", "completion": f"rebmun {i} zip"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def early(
    tmp_path_factory: pytest.TempPathFactory,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
    unlike: Path,
) -> tuple[Path, dict[str, Any]]:
    """The config of a run that stopped early, and the output of `--json`."""
    folder = tmp_path_factory.mktemp("early")
    config = write_config(folder, data__eval_source=str(unlike), **OVERFITS)
    ended = run_cli("train", config, "--json")
    assert ended.code == 0, ended.err
    assert "stopped early, no lower held-out loss in 3 evaluations" in ended.err
    return config, json.loads(ended.out)


def losses(run: Path, name: str = "eval/loss") -> dict[int, float]:
    return {r["step"]: r[name] for r in read_metrics(run / "metrics.jsonl") if name in r}


def trained(run: Path) -> dict[int, float]:
    return losses(run, "train/loss")


def test_three_steps_taken_on_to_six_are_a_run_of_six(
    tmp_path: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any]
) -> None:
    config = write_config(tmp_path, lora__dropout=0.1, train__save_every=0, train__eval_every=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_cli("train", config, f"--output={whole}", "--train.steps=6").code == 0
    assert run_cli("train", config, f"--output={parts}", "--train.steps=3").code == 0
    ended = run_cli("train", parts, "--train.steps=6", "--resume")
    assert ended.code == 0, ended.err
    assert "changed on resume: train.steps: 3 → 6" in ended.err
    assert "warning" not in ended.err
    assert (parts / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert trained(parts) == trained(whole)
    assert losses(parts) == losses(whole)
    assert configs.load_config(parts / "config.yaml").train.steps == 6
    told = manifest.read(parts)
    assert told["config"]["train"]["steps"] == told["results"]["steps"] == 6
    assert len(told["earlier"]) == 1
    # a finished run is not loaded and not changed
    before = (parts / "manifest.json").read_bytes()
    again = run_cli("train", parts, "--resume")
    assert again.code == 0
    assert again.err == f"{parts}: finished at step 6; give --train.steps=M to go on\n"
    assert "exported: step 6 of 6, the last one" in again.out
    assert (parts / "manifest.json").read_bytes() == before
    fewer = run_cli("train", parts, "--resume", "--train.steps=5")
    assert fewer.code == 2
    assert "6 steps are done, and 5 were asked for" in fewer.message


def test_a_kill_between_manifest_and_config_is_resumed(
    tmp_path: Path,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    config = write_config(tmp_path, optimizer__schedule="linear", train__steps=2)
    assert run_cli("train", config).code == 0
    replace = os.replace

    def until(old: Any, new: Any) -> None:
        if os.path.basename(new) == "config.yaml":
            raise Killed
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until)
        with pytest.raises(Killed):
            run_cli("train", config, "--train.steps=4", "--resume")
    run = tmp_path / "run"
    assert configs.load_config(run / "config.yaml").train.steps == 2
    assert manifest.read(run)["finished"] is None
    copy = shutil.copytree(run, tmp_path / "copy")
    ended = run_cli("train", config, "--train.steps=4", "--resume")
    assert ended.code == 0, ended.err
    assert "with 4 instead of 2 the learning rate continues at 0.005, not 0; a run" in ended.err
    assert list(trained(run)) == [1, 2, 3, 4]
    # resuming with the old number of steps is possible, too
    ended = run_cli("train", config, "--resume", f"--output={copy}")
    assert ended.code == 0, ended.err
    assert list(trained(Path(copy))) == [1, 2]


def test_the_best_step_is_what_is_exported_evaluated_and_told(
    early: tuple[Path, dict[str, Any]], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    config, summary = early
    run = config.parent / "run"
    found = {step: loss for step, loss in losses(run).items() if step}
    best = min(found, key=lambda step: found[step])
    assert 0 < best < summary["steps"] < 60
    assert summary["steps"] == best + 6  # three evaluations later
    assert summary["exported_step"] == best
    assert summary["eval_after"] == found[best]
    assert (summary["planned_steps"], summary["keep_best"], summary["patience"]) == (60, True, 3)
    assert best in saved_steps(run)
    assert manifest.read(run)["results"]["exported_step"] == best
    text = (run / "report.md").read_text("utf-8")
    assert f"step {best} of 60, the lowest held-out loss, {found[best]:.4f}; stopped" in text
    # the commands read that step
    evaluated = json.loads(run_cli("evaluate", run, "--json").out)
    assert evaluated["step"] == best
    assert evaluated["loss"] == pytest.approx(found[best], abs=1e-6)
    # the exported adapter has that step, too: another run starts from it
    tree = json.loads(config.read_text())
    del tree["lora"]
    tree["lora"] = {"from_adapter": str(run / "adapter")}
    tree["output"] = str(tmp_path / "next")
    tree["train"] |= {"steps": 1, "keep_best": False, "patience": 0}
    (tmp_path / "next.yaml").write_text(json.dumps(tree))
    ended = run_cli("train", tmp_path / "next.yaml", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["eval_before"] == pytest.approx(found[best], abs=1e-6)


def test_killed_and_resumed_it_stops_and_chooses_alike(
    early: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config, summary = early
    whole, killed = config.parent / "run", tmp_path / "killed"
    trial = Trial(config, environment=os.environ | {"PYTHONPATH": str(ROOT)})
    best, last = summary["exported_step"], summary["steps"]
    moments = [Moment(step=1), Moment(step=best, saving=True), Moment(step=last)]
    hits = [trial.hit(killed, moment) for moment in moments]
    assert any(hit.sent for hit in hits)
    trial.finish(killed)
    assert kill_resume.adapter_hash(killed) == kill_resume.adapter_hash(whole)
    assert losses(killed) == losses(whole)
    assert trained(killed) == trained(whole)
    assert saved_steps(killed) == saved_steps(whole)
    told = [manifest.read(run)["results"] for run in (killed, whole)]
    assert told[0]["exported_step"] == told[1]["exported_step"]


def test_a_run_that_stopped_early_is_finished_until_its_patience_grows(
    early: tuple[Path, dict[str, Any]], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    config, summary = early
    run = Path(shutil.copytree(config.parent / "run", tmp_path / "run"))
    ended = run_cli("train", run, "--resume")
    assert ended.code == 0
    assert f"finished at step {summary['steps']}; stopped early" in ended.err
    end = summary["steps"] + 2
    more = ("--train.patience=0", f"--train.steps={end}", "--train.keep_best=false")
    ended = run_cli("train", run, "--resume", "--json", *more)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["steps"] == found["exported_step"] == end
    assert found["eval_after"] == losses(run)[end]


def test_epochs_are_steps_that_pass_the_data(
    tmp_path: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any], unlike: Path
) -> None:
    config = write_config(
        tmp_path,
        train__steps=None,
        train__epochs=1.5,
        data__eval_source={"other": str(unlike), "more": str(unlike)},
        optimizer__warmup_steps=9,
    )
    ended = run_cli("train", config, "--json")
    assert ended.code == 0, ended.err
    summary = json.loads(ended.out)
    run = tmp_path / "run"
    epochs = losses(run, "train/epoch")
    assert f"1.5 epochs: {summary['steps']} steps" in ended.err
    assert max(epochs) == summary["steps"]
    assert epochs[summary["steps"]] >= 1.5 > epochs[summary["steps"] - 1]
    assert "warning: optimizer.warmup_steps 9 is not below the" in ended.err
    assert list(summary["eval_sets"]) == ["other", "more"]
    assert summary["eval_sets"]["more"]["after"] == summary["eval_after"]
    assert losses(run, "eval/more/loss") == losses(run)
    assert all(math.isfinite(loss) for loss in losses(run).values())
    ended = run_cli("train", run, "--resume", "--train.epochs=2", "--json")
    assert ended.code == 0, ended.err
    assert losses(run, "train/epoch")[json.loads(ended.out)["steps"]] == 2
    stored = configs.load_config(run / "config.yaml").train
    assert (stored.epochs, stored.steps) == (2.0, None)
