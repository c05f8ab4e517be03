"""Tests inputs that a command can make: --dry-run lists them; a sweep makes them first."""

import json
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.sweep import find, inputs

INPUT = """
    inputs=lambda cell: [
        __import__("qlora_jax").sweep.Input(RAN / "made" / "model", {arguments!r}, "seconds")
    ] if cell["rank"] == 8 else [],
"""
ARGUMENTS = ("pretrain", "a config.yaml", "--resume")
COMMAND = "qlora-jax pretrain 'a config.yaml' --resume"

Sweep = Callable[..., Any]


@pytest.fixture
def commands(toy: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the started commands; each makes the folder, or fails if a file `broken` exists."""
    toy.write(more=INPUT.format(arguments=ARGUMENTS))
    started: list[list[str]] = []

    def run(command: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
        started.append(command[3:])
        if (toy.folder / "broken").exists():
            return subprocess.CompletedProcess(command, 2)
        (toy.folder / "made" / "model").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(inputs, "subprocess", types.SimpleNamespace(run=run))
    return started


def test_only_cells_that_read_it_need_it(toy: Any, commands: Any) -> None:
    experiment = find.load_experiment(toy.path)
    (wanted,) = inputs.missing(experiment, experiment.cells())
    assert str(wanted) == f"{toy.folder}/made/model is not there and is made first: " + (
        f"{COMMAND} (seconds)"
    )
    without = find.where(experiment.cells(), ["rank=16"])
    assert inputs.missing(experiment, without) == []
    inputs.make(wanted)
    assert commands == [list(ARGUMENTS)]
    assert inputs.missing(experiment, experiment.cells()) == []


def test_a_dry_run_tells_of_it_and_makes_nothing(toy: Any, commands: Any, sweep: Sweep) -> None:
    ended = sweep("--dry-run")
    assert ended.code == 0, ended.err
    assert ended.out.endswith(f"/made/model is not there and is made first: {COMMAND} (seconds)\n")
    told = json.loads(sweep("--dry-run", "--json").out)
    path = str(toy.folder / "made" / "model")
    assert told["inputs"] == [{"path": path, "command": COMMAND, "cost": "seconds"}]
    assert "inputs" not in json.loads(sweep("--dry-run", "--json", "--where", "rank=16").out)
    assert commands == []


def test_it_is_made_before_the_cells_and_once(toy: Any, commands: Any, sweep: Sweep) -> None:
    chosen = ("--where", "method=lora", "--where", "seed=0", "--where", "rank=8,16")
    ended = sweep(*chosen, "--json")
    assert ended.code == 0, ended.err
    assert ended.err.startswith(f"{toy.folder}/made/model is not there and is made first: ")
    assert json.loads(ended.out)["cells"] == {"done": 2}
    assert commands == [list(ARGUMENTS)]
    (toy.folder / "made" / "model").rmdir()
    assert sweep(*chosen).code == 0  # no cell remains, so no input is needed
    assert sweep("--analyse-only").code == 0
    assert commands == [list(ARGUMENTS)]


def test_what_makes_it_may_fail(toy: Any, commands: Any, sweep: Sweep) -> None:
    (toy.folder / "broken").touch()
    ended = sweep()
    assert ended.code == 1
    assert ended.message == (
        f"qlora-jax: {toy.folder}/made/model was not made: {COMMAND} ended with exit code 2"
    )
    assert toy.runs("began") == []


@pytest.mark.slow
def test_a_model_is_pretrained_for_the_cells(toy: Any, sweep: Sweep, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} is a number of Python." for i in range(400)))
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "layers": 1}
    config = {
        "method": "full",
        "model": {"path": "from-scratch", "storage_dtype": "float32", "remat": "none"},
        "pretrain": {**shape, "heads": 2, "positions": 64},
        "data": {"source": str(text), "format": "text", "sequence_length": 32},
        "output": str(toy.folder / "made"),
        "train": {"steps": 2, "batch_size": 2, "eval_every": 0, "save_every": 1, "samples": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    toy.write(
        "assert (RAN / 'made' / 'model' / 'config.json').exists()",
        INPUT.format(arguments=("pretrain", str(path), "--resume")),
    )
    ended = sweep("--where", "rank=8", "--where", "seed=0")
    assert ended.code == 0, ended.err
    assert len(toy.runs()) == 2
