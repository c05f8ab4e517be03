"""Runs on several devices, by the command line: trained, resumed on other devices, evaluated."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.tools.devices import Devices, ended, losses, start
from qlora_jax.train.metrics import read_metrics

pytestmark = pytest.mark.quick
RANK = 64
"""Adapter rank: A and B are large enough to be split over devices."""


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def config(tmp_path_factory, write_config) -> Path:
    folder = tmp_path_factory.mktemp("mesh")
    return write_config(
        folder,
        lora={"rank": RANK, "alpha": 6, "dropout": 0.1},
        train__batch_size=8,
        train__steps=4,
    )


@pytest.fixture(scope="module")
def runs(config: Path, run_cli: Callable[..., Any]) -> Callable[[str, str], Path]:
    """Returns a function that trains on a mesh, once per shape, and returns the run directory."""
    made: dict[tuple[str, str], Path] = {}

    def train(data: str, fsdp: str) -> Path:
        if (data, fsdp) not in made:
            run = config.parent / f"run-{data}-{fsdp}"
            # generates samples only with fsdp 2, which only a slow test uses
            sizes = f"--mesh.data={data}", f"--mesh.fsdp={fsdp}"
            samples = f"--train.samples={int(fsdp == '2')}"
            done = run_cli("train", config, f"--output={run}", *sizes, samples)
            assert done.code == 0, done.err
            made[data, fsdp] = run
        return made[data, fsdp]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [("2", "4"), ("1", "2")])
def test_a_run_on_a_mesh_is_the_run_on_one_device(runs, data: str, fsdp: str) -> None:
    alone, spread = runs("1", "1"), runs(data, fsdp)
    np.testing.assert_allclose(losses(spread), losses(alone), rtol=1e-5)
    one, other = adapter(alone), adapter(spread)
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, atol=1e-4)
    hashes = {json.loads((r / "manifest.json").read_text())["base_hash"] for r in (alone, spread)}
    assert len(hashes) == 1
    assert "data 2 x fsdp 4" in (runs("2", "4") / "report.md").read_text()


@pytest.mark.slow
def test_rows_by_themselves_and_micro_batches_too(config, run_cli, tmp_path) -> None:
    settings = ("--data.packing=false", "--train.gradient_accumulation=2", "--train.steps=2")
    found = []
    for sizes in (("--mesh", "none"), ("--mesh.data=2", "--mesh.fsdp=4")):
        run = tmp_path / str(len(found))
        done = run_cli("train", config, f"--output={run}", *settings, *sizes)
        assert done.code == 0, done.err
        found.append(losses(run))
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [("1", "1"), ("1", "2"), ("2", "2"), ("2", "4")])
def test_a_run_resumes_on_other_devices(config, runs, run_cli, tmp_path, sizes) -> None:
    """Saves after two steps on eight devices; resuming on the same mesh gives the same bits."""
    whole, run = runs("2", "4"), tmp_path / "run"
    both = ["--mesh.data=2", "--mesh.fsdp=4"]
    assert run_cli("train", config, f"--output={run}", *both, "--train.steps=2").code == 0
    data, fsdp = sizes
    on = f"--mesh.data={data}", f"--mesh.fsdp={fsdp}"
    done = run_cli("train", run, "--resume", *on, "--train.steps=4")
    assert done.code == 0, done.err
    if sizes == ("2", "4"):
        assert losses(run) == losses(whole)
        for name, values in adapter(whole).items():
            np.testing.assert_array_equal(adapter(run)[name], values)
    else:
        np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_one_device_resumes_on_eight(config, runs, run_cli, tmp_path) -> None:
    run = tmp_path / "run"
    assert run_cli("train", config, f"--output={run}", "--train.steps=2").code == 0
    done = run_cli("train", run, "--resume", "--mesh.fsdp=8", "--train.steps=4")
    assert done.code == 0, done.err
    np.testing.assert_allclose(losses(run), losses(runs("1", "1")), rtol=1e-5)


@pytest.mark.slow
def test_the_other_commands_read_it_on_one_device(runs, run_cli, tmp_path) -> None:
    run = runs("2", "4")
    evaluated = run_cli("evaluate", run, "--json")
    assert evaluated.code == 0, evaluated.err
    found = json.loads(evaluated.out)
    last = [row["eval/loss"] for row in read_metrics(run / "metrics.jsonl") if "eval/loss" in row]
    assert last[-1] == pytest.approx(found["loss"], rel=1e-6)
    for command in (
        ("generate", run, "--prompt", "What?", "--max-new-tokens", "4"),
        ("merge", run, tmp_path / "merged"),
        ("export", run, tmp_path / "exported"),
    ):
        done = run_cli(*command)
        assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("--mesh.fsdp=16",), "is for 16 devices, and jax has 8"),
        (("--mesh.fsdp=3",), "train.batch_size 8 is not a multiple of the 3 devices"),
        (("--mesh.fsdp=0",), "mesh.fsdp: input should be greater than or equal to 1"),
        (("--mesh.fdsp=2",), "the nearest is --mesh.fsdp"),
        (("--mesh", "some"), "mesh.data: input should be a valid integer"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(config, run_cli, tmp_path, settings, expected) -> None:
    output = tmp_path / "run"
    done = run_cli("train", config, f"--output={output}", *settings)
    assert done.code == 2
    assert expected in done.message
    assert not output.exists()


@pytest.mark.slow
def test_what_cannot_be_split_is_told(config, run_cli, tmp_path) -> None:
    sizes = ("--mesh.fsdp=7", "--train.batch_size=7", "--train.steps=1")
    done = run_cli("train", config, f"--output={tmp_path / 'run'}", *sizes)
    assert done.code == 0, done.err
    assert "mesh.fsdp 7 divides no axis of" in done.err


TWO = Devices(data=1, fsdp=8, processes=2)
WAIT_S = 400


@pytest.mark.slow
def test_two_processes_train_one_run(config, runs, tmp_path) -> None:
    run = tmp_path / "run"
    (code, out, err), (other, silent, lost) = ended(start(config, run, TWO, "--json"), WAIT_S)
    assert (code, other) == (0, 0), err + lost
    assert json.loads(out)["steps"] == 4
    assert not silent
    np.testing.assert_allclose(losses(run), losses(runs("1", "1")), rtol=1e-5)
    for name, values in adapter(runs("1", "1")).items():
        np.testing.assert_allclose(adapter(run)[name], values, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_all(config, runs, run_cli, tmp_path, killed) -> None:
    """The other process ends with an error line; one process resumes the saved checkpoint."""
    run, steps = tmp_path / "run", ("--train.steps=400", "--train.eval_every=0")
    both = start(config, run, TWO, "--train.save_every=1", "--train.samples=0", *steps)
    waiting = time.monotonic()
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert time.monotonic() - waiting < 300
        assert both[0].poll() is None
        time.sleep(0.2)
    both[killed].kill()
    began = time.monotonic()
    left = ended(both, WAIT_S)
    assert time.monotonic() - began < 60
    assert left[killed][0] == -signal.SIGKILL
    code, _, err = left[1 - killed]
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"qlora-jax: process {1 - killed} of 2: ")
    assert "--resume continues" in last
    saved = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    again = f"--train.steps={saved + 1}"
    resumed = run_cli("train", run, "--resume", "--mesh", "none", again, "--train.eval_every=0")
    assert resumed.code == 0, resumed.err
    assert len(losses(run)) == saved + 1
    first = losses(runs("1", "1"))[:2]
    np.testing.assert_allclose(losses(run)[:2], first, rtol=1e-5)


@pytest.mark.slow
def test_processes_that_differ_are_refused(config, tmp_path) -> None:
    run = tmp_path / "run"
    both = start(config, run, TWO, each=((), ("--lora.rank=8",)))
    for index, (code, _, err) in enumerate(ended(both, WAIT_S)):
        assert code == 2
        assert f"process {index} of 2: processes 0 and 1 have different configs" in err
    assert not run.exists()
