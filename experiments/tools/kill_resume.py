"""Checks that a run that is killed repeatedly ends with the same bytes as an undisturbed run.

Expected: equal bytes after kills at any moment: during import, loading or compilation, between
  steps, while saving, or after the last step.
Cost: two runs of the config, and one more start of the command for each kill.
Command: python -m experiments.tools.kill_resume configs/quickstart.yaml --kills 5 --seed 0
  Further arguments are settings for both runs, such as --train.steps=20.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax import config as configs

ADAPTER = Path("adapter") / "adapter_model.safetensors"
POLL_SECONDS = 0.002


@dataclasses.dataclass(frozen=True)
class Moment:
    """Conditions that must all hold before a signal is sent, and the signal.

    Attributes:
      after: smallest age of the process, in seconds.
      step: training step that must be logged; 0 for none.
      saving: whether the process must be writing a checkpoint.
      number: signal to send.
    """

    after: float = 0.0
    step: int = 0
    saving: bool = False
    number: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        parts = [f"{self.after:.1f} s after the start"] if self.after else []
        parts += [f"from step {self.step} on"] if self.step else []
        parts += ["while saving"] if self.saving else []
        return f"{self.number.name} {' '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class Hit:
    """Result of waiting for a moment to send a signal.

    Attributes:
      moment: conditions that were waited for.
      sent: whether the signal was sent; if not, the process ended first.
      code: exit code of the process; negative for a signal.
      step: last step that was logged.
      saved: last step with a complete checkpoint.
    """

    moment: Moment
    sent: bool
    code: int
    step: int
    saved: int


class Trial:
    """Runs of one config, each in its own process and output directory."""

    def __init__(
        self,
        config: str | Path,
        settings: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", "qlora_jax", "train", str(config), *settings]
        self._environment = dict(os.environ if environment is None else environment)

    def finish(self, output: Path) -> float:
        """Runs, or resumes, to the end; returns the seconds until a step was logged.

        Raises:
          RuntimeError: the command failed; the message holds its exit code and last line.
        """
        began = time.monotonic()
        process = self._start(output)
        while process.poll() is None and not last_step(output):
            time.sleep(POLL_SECONDS)
        first = time.monotonic() - began
        if code := process.wait():
            lines = _log(output).read_text(encoding="utf-8").splitlines()
            raise RuntimeError(f"exit code {code}: {lines[-1] if lines else 'no message'}")
        return first

    def hit(self, output: Path, moment: Moment) -> Hit:
        """Runs, or resumes, and sends the signal when the conditions of `moment` hold."""
        began = time.monotonic()
        process = self._start(output)
        sent = False
        while process.poll() is None:
            if time.monotonic() - began >= moment.after and _has_come(output, moment):
                process.send_signal(moment.number)
                sent = True
                break
            time.sleep(POLL_SECONDS)
        code = process.wait()
        return Hit(moment, sent, code, last_step(output), max(saved_steps(output), default=0))

    def _start(self, output: Path) -> subprocess.Popen[bytes]:
        with _log(output).open("wb") as log:
            return subprocess.Popen(
                [*self._command, f"--output={output}", "--resume"],
                env=self._environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )


def last_step(output: Path) -> int:
    """Returns the last training step that the run has logged; 0 for none."""
    try:
        lines = (output / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return max((row["step"] for row in rows if "train/loss" in row), default=0)


def saved_steps(output: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in order."""
    folder = output / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def adapter_hash(output: Path) -> str:
    """Returns the SHA-256 of the adapter's file."""
    return hashlib.sha256((output / ADAPTER).read_bytes()).hexdigest()


def choose(
    rng: random.Random, reached: int, steps: int, kills_left: int, start_seconds: float
) -> Moment:
    """Returns a random moment that leaves steps for the remaining kills."""
    kind = rng.choice(["starting", "stepping", "saving"])
    if kind == "starting":
        return Moment(after=rng.uniform(0.0, start_seconds))
    stride = 2 * (steps - reached) / (kills_left + 1)
    step = min(steps, reached + 1 + int(rng.uniform(0, stride)))
    return Moment(step=step, saving=kind == "saving")


def _has_come(output: Path, moment: Moment) -> bool:
    return last_step(output) >= moment.step and (not moment.saving or _is_saving(output))


def _log(output: Path) -> Path:
    return output.with_name(f"{output.name}.log")


def _is_saving(output: Path) -> bool:
    folder = output / "checkpoints"
    # orbax writes a step under a temporary name and renames it when it is complete.
    return folder.is_dir() and any("orbax-checkpoint-tmp" in p.name for p in folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options, settings = parser.parse_known_args()
    steps = configs.load_config(options.config, configs.parse_overrides(settings)).train.step_count
    rng = random.Random(options.seed)
    trial = Trial(options.config, settings)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        seconds = trial.finish(whole)
        print(f"uninterrupted: {steps} steps, the first after {seconds:.1f} s", flush=True)
        landed = 0
        for i in range(options.kills):
            moment = choose(rng, last_step(killed), steps, options.kills - i, seconds)
            hit = trial.hit(killed, moment)
            landed += hit.sent
            what = f"step {hit.step} reached" if hit.sent else "it had ended before"
            print(f"kill {i + 1}: {moment}: {what}, step {hit.saved} saved", flush=True)
        trial.finish(killed)
        hashes = [adapter_hash(output) for output in (whole, killed)]
    equal = hashes[0] == hashes[1]
    print(f"adapter bytes {'equal' if equal else 'differ'}: {hashes[0]}, {hashes[1]}")
    if landed < options.kills:
        print(f"only {landed} of {options.kills} kills landed; give more steps")
    return 0 if equal and landed == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
