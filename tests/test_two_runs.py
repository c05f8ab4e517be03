"""Two runs cannot use one folder, and a run notices if its folder is deleted."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow

SECONDS = 120


@pytest.fixture
def config(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """Config of a run that takes longer than its test."""
    long = {"train__steps": 5000, "train__eval_every": 0, "train__save_every": 50}
    return write_config(tmp_path, **long)


@pytest.fixture
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    """Process of the run of `config`, after its first checkpoint."""
    command = [sys.executable, "-m", "qlora_jax", "train", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait(lambda: (config.parent / "run" / "checkpoints" / "50").is_dir())
            yield process
        finally:
            process.kill()


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Asks a run to stop; returns its exit code and the last line on stderr."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=SECONDS)
    return process.returncode, said.strip().splitlines()[-1]


def test_other_runs_are_refused_and_leave_it_alone(
    config: Path, running: subprocess.Popen[str], run_cli: Callable[..., Any]
) -> None:
    run = config.parent / "run"
    for more in (["--resume"], ["--overwrite"], ["--overwrite", "--train.steps=2"], []):
        ended = run_cli("train", config, *more)
        assert ended.code == 2
        assert "another run is writing there" in ended.message
        assert "Traceback" not in ended.err
    code, said = stop(running)
    assert code == 143
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert f"after step {len(steps)}; the state is saved" in said
    assert max(int(p.name) for p in (run / "checkpoints").iterdir()) == len(steps)
    assert json.loads((run / "manifest.json").read_text())
    ended = run_cli("train", config, "--overwrite", "--train.steps=2")
    assert ended.code == 0, ended.err


def test_a_deleted_folder_is_not_called_saved(
    config: Path, running: subprocess.Popen[str], run_cli: Callable[..., Any]
) -> None:
    run = config.parent / "run"
    run.rename(run.with_name("away"))
    shutil.rmtree(run.with_name("away"))
    code, said = stop(running)
    assert code == 2
    assert "was deleted, moved or replaced while the run was writing there" in said
    assert not run.exists()
    ended = run_cli("train", config, "--train.steps=2")
    assert ended.code == 0, ended.err
