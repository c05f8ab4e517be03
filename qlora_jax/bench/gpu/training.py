"""Trains by the command line: quickstart, resume after a kill, moments on the host, float16.

Runs that are compared bit by bit use the flags `EXACT`. Without them, XLA may tune products
differently in each process, and other algorithms add in another order.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from qlora_jax.bench.gpu.lane import CUBLAS, FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.programs import BenchProgram
from qlora_jax.bench.gpu.steps import step_programs
from qlora_jax.config import from_tree
from qlora_jax.formats.fetch import cached
from qlora_jax.kernels.target import capability_of, half_dtype
from qlora_jax.models.shapes import find
from qlora_jax.runtime.errors import OutOfTime, RunFailed
from qlora_jax.train import checkpoint

EXACT = f"{CUBLAS} --xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true"
BUILTIN = "smollm2-135m-instruct"
POLL = 0.05
"""Seconds between two checks of a run that will be killed."""

TRAINED = {
    "data": {"source": "python-docs", "sequence_length": 256},
    "lora": {"rank": 16, "alpha": 32},
    "optimizer": {"learning_rate": 5e-4, "schedule": "cosine", "warmup_steps": 5},
}
"""Settings of configs/quickstart.yaml that all runs share."""

PRETRAINED = {
    "method": "full",
    "model": {"path": "from-scratch", "storage_dtype": "float32", "remat": "none"},
    "data": {"source": "python-docs", "format": "text", "sequence_length": 128},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 10},
}
"""Settings of a small model of our own, used if the built-in model is not in the cache and nothing
can be downloaded."""


class Sizes(NamedTuple):
    """Settings `train` of the quickstart and the compared runs; settings of the small model."""

    quickstart: Mapping[str, Any]
    compared: Mapping[str, Any]
    pretrain: Mapping[str, Any]
    pretrain_steps: int


SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2}
SIZES = {
    FULL: Sizes(
        {"steps": 80, "batch_size": 2, "eval_every": 0, "eval_rows": 16, "samples": 1},
        {"steps": 24, "batch_size": 2, "eval_every": 0, "save_every": 8, "samples": 0},
        {"vocab_size": 4096, "hidden_size": 256, "layers": 4, "positions": 256},
        200,
    ),
    REHEARSAL: Sizes(
        {"steps": 3, "batch_size": 1, "eval_every": 0, "eval_rows": 2, "samples": 0},
        {"steps": 12, "batch_size": 1, "eval_every": 0, "save_every": 4, "samples": 0},
        SMALL | {"positions": 256},
        3,
    ),
}
QUICKSTART = ("quickstart: loss falls", "quickstart: speed", "quickstart: seconds")
HOST = "moments on the host: the same adapter"
RESUMED = "killed and resumed, moments on the host: the same adapter"
HALF = "float16 with loss scaling: loss is finite"


def names(scale: str) -> list[str]:
    """Returns the names of the results."""
    return [*QUICKSTART, HOST, RESUMED, HALF]


def programs(scale: str, device: Any) -> Iterator[BenchProgram]:
    """Yields the programs of the training steps on the built-in model."""
    size, half_type = SIZES[scale], half_dtype(capability_of(device))
    for name, train, dtype, flags in (
        ("quickstart", size.quickstart, half_type, CUBLAS),
        ("float16", size.compared, "float16", CUBLAS),
        ("compared", size.compared, half_type, EXACT),
    ):
        tree = settings(BUILTIN, dtype, train) | {"output": "none"}
        config = from_tree(tree, name)
        yield from step_programs(name, config, find("smollm2-135m"), device, flags)


def run(lane: PartContext) -> None:
    """Runs the trainings in a folder that is deleted at the end."""
    with tempfile.TemporaryDirectory() as folder, lane.guard(*names(lane.scale)):
        work = Path(folder)
        runs = Runs(lane, work, base(lane, work))
        if lane.due(20, *QUICKSTART):
            with lane.guard(*QUICKSTART):
                quickstart(lane, runs)
        if lane.due(20, HALF):
            with lane.guard(HALF):
                half(lane, runs)
        if lane.due(60, HOST, RESUMED):
            with lane.guard(HOST, RESUMED):
                compared(lane, runs)


class Runs:
    """The command-line runs of one model.

    Args:
      lane: lane of the part.
      work: folder that the runs write to.
      model: value of the setting `model.path`.
    """

    def __init__(self, lane: PartContext, work: Path, model: str):
        self.lane, self.work, self.model = lane, work, model

    def config(self, name: str, train: Mapping[str, Any], **more: Any) -> Path:
        """Writes the config of a run whose output folder has the run's name."""
        tree = settings(self.model, self.lane.dtype(), train)
        return written(self.work, name, _merged(tree, more))

    def finish(self, config: Path, *arguments: str, exact: bool = False) -> dict[str, Any]:
        """Trains to the end and returns what `--json` prints."""
        return command(self.lane, "train", str(config), "--json", *arguments, exact=exact)


def settings(model: str, dtype: str, train: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run, without its output folder."""
    own = {"path": model, "compute_dtype": dtype, "storage_dtype": dtype}
    return {**TRAINED, "model": own, "train": train}


def base(lane: PartContext, work: Path) -> str:
    """Returns the model to train: the built-in one if cached, else a small one pretrained here."""
    if not lane.rehearsing and cached(BUILTIN) is not None:
        return BUILTIN
    size = SIZES[lane.scale]
    train = {"steps": size.pretrain_steps, "batch_size": 4, "eval_every": 0, "samples": 0}
    tree = PRETRAINED | {"pretrain": dict(size.pretrain), "train": train}
    config = written(work, "base", tree)
    command(lane, "pretrain", str(config), "--json", "--overwrite")
    return str(work / "base" / "model")


def quickstart(lane: PartContext, runs: Runs) -> None:
    """Trains as configs/quickstart.yaml does and records loss, speed and time."""
    told = runs.finish(runs.config("quickstart", SIZES[lane.scale].quickstart), "--overwrite")
    before, after = told["eval_before"], told["eval_after"]
    model = BUILTIN if runs.model == BUILTIN else "a small model made here"
    lane.record.check(QUICKSTART[0], after < before, before=before, after=after, model=model)
    lane.record.figure(QUICKSTART[1], "tokens/s", told["tokens_per_s"], model=model)
    lane.record.figure(QUICKSTART[2], "s", told["wall_s"], peak_bytes=told["peak_device_bytes"])


def compared(lane: PartContext, runs: Runs) -> None:
    """Trains with moments on the device, on the host, and killed; adapters must be equal."""
    train, host = SIZES[lane.scale].compared, {"optimizer": {"offload": "host"}}
    runs.finish(runs.config("device", train), "--overwrite", exact=True)
    expected = adapter(runs.work / "device")
    runs.finish(runs.config("host", train, **host), "--overwrite", exact=True)
    lane.record.check(HOST, adapter(runs.work / "host") == expected)
    config = runs.config("killed", train, **host)
    saved = kill(lane, config, runs.work / "killed")
    runs.finish(config, "--resume", exact=True)
    right = saved > 0 and adapter(runs.work / "killed") == expected
    lane.record.check(RESUMED, right, killed_with_checkpoint_of_step=saved)


def half(lane: PartContext, runs: Runs) -> None:
    """Trains in float16 with loss scaling, and records whether the loss stays finite."""
    dtype = {"compute_dtype": "float16", "storage_dtype": "float16"}
    train = {**SIZES[lane.scale].compared, "eval_rows": 2}
    told = runs.finish(runs.config("float16", train, model=dtype), "--overwrite")
    after = told["eval_after"]
    lane.record.check(HALF, after == after, after=after, skipped_steps=told["skipped"])


def kill(lane: PartContext, config: Path, output: Path) -> int:
    """Starts a run, kills it after its first checkpoint, and returns the newest one's step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_jax", "train", str(config), "--overwrite"],
        env=environment(exact=True),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and lane.left() > 0:
            if steps_in(output):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(POLL)
    finally:
        process.kill()
        process.wait()
    return max(steps_in(output), default=0)


def steps_in(output: Path) -> list[int]:
    """Returns the steps of the checkpoints of a run."""
    folder = output / checkpoint.FOLDER
    if not folder.is_dir():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def adapter(output: Path) -> str:
    """Returns the SHA-256 of a run's adapter."""
    return hashlib.sha256(
        (output / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def environment(exact: bool) -> dict[str, str]:
    """Returns the environment of a run."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {EXACT if exact else ''}".strip()
    return dict(os.environ) | ({"XLA_FLAGS": flags} if flags else {})


def command(lane: PartContext, *arguments: str, exact: bool = False) -> dict[str, Any]:
    """Runs our program and returns the JSON that it prints.

    The lines of its standard error go to the log, each with the seconds since the program began.

    Raises:
      RunFailed: the program failed.
      OutOfTime: the program took longer than the time that was left.
    """
    began, late, last = time.monotonic(), threading.Event(), "it said nothing"
    with subprocess.Popen(
        [sys.executable, "-m", "qlora_jax", *arguments],
        env=environment(exact),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(lane.left(), 1), end)
        timer.start()
        for line in process.stderr or ():
            print(f"{time.monotonic() - began:6.1f} {line}", end="", flush=True)
            last = line.strip() or last
        told = process.stdout.read() if process.stdout else ""
        process.wait()
        timer.cancel()
    if late.is_set():
        raise OutOfTime(f"{arguments[0]} took longer than the time that was left: {last}")
    if process.returncode:
        raise RunFailed(f"{arguments[0]} ended with code {process.returncode}: {last}")
    return json.loads(told)


def written(work: Path, name: str, tree: Mapping[str, Any]) -> Path:
    """Writes WORK/NAME.yaml, the config of a run that writes to WORK/NAME."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{name}.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(dict(tree) | {"output": str(work / name)}, file)
    return path


def _merged(tree: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {**tree.get(key, {}), **more.get(key, {})} for key in {**tree, **more}}
