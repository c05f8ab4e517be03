"""Settings that a resumed run may change, and runs that are finished; loads no model."""

import dataclasses
import json

import pytest

from qlora_jax import config as configs
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import resume
from qlora_jax.train.finish import describe_finished, finished
from qlora_jax.train.report import RunSummary

RESULTS = {
    "model": "m",
    "method": "lora",
    "quantization": "",
    "rank": 4,
    "trainable": 1,
    "total": 2,
    "device": "a CPU",
    "base_hash": "2:ab",
    "steps": 6,
    "skipped": 0,
    "wall_s": 1.0,
    "tokens": 10,
    "tokens_per_s": 5.0,
    "peak_rss_bytes": 1,
    "eval_before": 3.0,
    "eval_after": 2.0,
    "eval_tokens": 4,
    "command": "c",
    "run_dir": "where it was made",
}
"""Results as versions without held-out sets wrote them."""


def make(folder, **settings):
    tree = {"model": {"path": "m"}, "data": {"source": "d"}, "output": str(folder)}
    config = configs.from_tree(tree | {"train": {"steps": 6}}, "test")
    return configs.changed(config, {k.replace("__", "."): v for k, v in settings.items()})


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run of 6 steps."""
    folder = tmp_path / "run"
    for name in ("adapter", "checkpoints/4", "checkpoints/6", "checkpoints/damaged-8"):
        (folder / name).mkdir(parents=True)
    (folder / "report.md").touch()
    configs.dump(make(folder), folder / "config.yaml")
    told = {"config_sha256": "", "finished": "2026-01-01", "results": RESULTS}
    (folder / "manifest.json").write_text(json.dumps(told))
    return folder


def other(config, key):
    """Returns a value that differs from the setting's value in `config`, as text."""
    settings = {s.key: s for s in configs.all_settings()}
    kind = settings[key].type
    choices = {
        "bool": "true",
        "int": "77",
        "float": "0.123",
        "int | null": "77",
        "float | null": "0.123",
    }
    if kind in choices:
        return choices[kind]
    known = str(dict(pairs(config))[key])
    return next(x for x in kind.split(" | ") if x not in (known, "null"))


def pairs(config, prefix=""):
    tree = configs.to_tree(config)
    for section, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{k}", v) for k, v in value.items())
        else:
            yield section, value


@pytest.mark.parametrize("key", [k for k in resume.MAY_CHANGE if k != "train.epochs"])
def test_what_may_change_is_said_with_what_then_holds(tmp_path, key):
    stored = make(tmp_path)
    asked = configs.changed(stored, {key: other(stored, key)})
    resume.check(tmp_path, stored, asked)
    first, *warnings = resume.describe(stored, asked)
    assert first.startswith(f"changed on resume: {key}: ")
    notes = resume.MAY_CHANGE[key]
    assert len(warnings) == (notes is not None)
    assert all(line.startswith(f"warning: {key}: ") and notes in line for line in warnings)
    assert not resume.is_same(stored, asked)


def test_every_setting_that_may_change_exists():
    assert resume.MAY_CHANGE.keys() <= {s.key for s in configs.all_settings()}


@pytest.mark.parametrize(
    "settings",
    [
        {"train__seed": "1"},
        {"train__eval_rows": "9"},
        {"data__sequence_length": "9"},
        {"optimizer__schedule": "cosine"},
        {"optimizer__learning_rate": "1"},
        {"model__compute_dtype": "float32"},
        {"data__eval_source": "{a: b}"},
    ],
    ids=str,
)
def test_what_changes_the_run_is_refused_with_a_remedy(tmp_path, settings):
    with pytest.raises(UserError) as e:
        resume.check(tmp_path, make(tmp_path), make(tmp_path, **settings, train__steps="8"))
    (key,) = (name.replace("__", ".") for name in settings)
    message = str(e.value)
    assert f"cannot be resumed; {key}: " in message
    assert "give another --output, or --overwrite to begin again" in message
    assert "train.steps: 6" not in message


def test_a_moved_run_is_the_same_one(tmp_path):
    assert resume.is_same(make(tmp_path), make(tmp_path / "elsewhere"))
    assert resume.describe(make(tmp_path), make(tmp_path / "elsewhere")) == []


def test_fewer_steps_than_are_done_are_refused(run):
    assert resume.steps_done(run) == 6
    resume.check_steps(run, 6)
    with pytest.raises(UserError, match=r"run: 6 steps are done, and 5 were asked for; give --"):
        resume.check_steps(run, 5)
    assert resume.steps_done(run / "none") == 0


def test_a_finished_run_is_known_before_anything_is_loaded(run):
    summary = finished(make(run))
    assert isinstance(summary, RunSummary)
    assert (summary.steps, summary.eval_after, summary.run_dir) == (6, 2.0, str(run))
    line = describe_finished(make(run), summary)
    assert line == f"{run}: finished at step 6; give --train.steps=M to go on"


def test_a_run_that_stopped_early_says_why(run):
    told = json.loads((run / "manifest.json").read_text())
    told["results"] |= {"planned_steps": 40, "exported_step": 4, "keep_best": True, "patience": 2}
    (run / "manifest.json").write_text(json.dumps(told))
    config = make(run)
    line = describe_finished(config, finished(config))
    assert "finished at step 6; stopped early at step 6, no lower held-out loss in 2 eval" in line
    assert line.endswith("give a larger --train.patience, or 0, to go on")


@pytest.mark.parametrize(
    "change",
    ["config", "report.md", "adapter", "checkpoints/6", "unfinished", "results", "more"],
)
def test_a_run_with_something_left_to_do_is_not_finished(run, change):
    config = make(run)
    path = run / change
    told = json.loads((run / "manifest.json").read_text())
    if change == "config":
        config = make(run, train__steps="8")
    elif path.is_dir():
        path.rmdir()
    elif path.is_file():
        path.unlink()
    elif change == "unfinished":
        told["finished"] = None
    elif change == "results":
        told["results"] = {"steps": 6}
    else:
        told["results"]["of a newer version"] = 1
    (run / "manifest.json").write_text(json.dumps(told))
    assert finished(config) is None


def test_a_finished_run_refuses_another_config(run):
    with pytest.raises(UserError, match=r"train.seed: 0 → 3"):
        finished(make(run, train__seed="3"))


def test_results_are_read_back_as_they_were_written(run):
    summary = finished(make(run))
    values = dataclasses.asdict(summary)
    assert {k: values[k] for k in RESULTS if k != "run_dir"} == {
        k: v for k, v in RESULTS.items() if k != "run_dir"
    }
