"""What every benchmark here shares: arguments, memory, the machine, figures.

Imports neither jax nor torch, so that both sides can import it first and count their own imports.
Sizes are MiB (2**20 bytes), times are seconds of wall clock unless a name says otherwise.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STARTED = time.perf_counter()

TUNING = ("XLA_", "JAX_", "OMP_", "MKL_", "ONEDNN_", "GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")
"""Starts of the names of environment variables that change speed or memory."""


def step_arguments(description: str, remat: Sequence[str]) -> argparse.ArgumentParser:
    """The options of a training-step benchmark; `remat`: this side's choices, the default first."""
    parser = load_arguments(description)
    parser.add_argument("--method", choices=["qlora", "lora", "full"], default="qlora")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute dtype"
    )
    parser.add_argument("--remat", choices=remat, default=remat[0])
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--seq", type=int, default=256, help="tokens a row, each with a target")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after one warm-up step")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and of the adapters")
    return parser


def load_arguments(description: str) -> argparse.ArgumentParser:
    """The options of a loading benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    return parser


def random_tokens(vocabulary: int, batch: int, seq: int, seed: int) -> tuple[np.ndarray, ...]:
    """Inputs and targets, int32[batch, seq] each: the same on both sides for the same seed."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (batch, seq + 1), dtype=np.int32)
    return ids[:, :-1], ids[:, 1:]


class PeakMemory:
    """Peak resident memory of this process, whole and since the last `restart`."""

    def __init__(self) -> None:
        self._before = 0.0
        self._restarted = True

    def restart(self) -> None:
        """Starts a new phase. Where the kernel does not let us, `phase` is None from here on."""
        self._before = self.process()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._restarted = False

    def process(self) -> float:
        """Since the process began."""
        return max(self._before, _status("VmHWM"))

    def phase(self) -> float | None:
        """Since the last `restart`."""
        return _status("VmHWM") if self._restarted else None

    @staticmethod
    def now() -> float:
        """Resident at this moment."""
        return _status("VmRSS")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"/proc/self/status has no {field}")


class Timed(NamedTuple):
    """Wall time of each timed step, and what other processes took of the machine meanwhile."""

    losses: list[float]
    warm_up: float
    seconds: list[float]
    others_cores: float

    def figures(self, tokens: int) -> dict[str, Any]:
        """As entries of a report; `tokens` are those of one step."""
        median = statistics.median(self.seconds)
        return {
            "warm_up_s": round(self.warm_up, 3),
            "step_median_s": round(median, 4),
            "step_min_s": round(min(self.seconds), 4),
            "step_s": [round(s, 4) for s in self.seconds],
            "tokens_per_s": round(tokens / median, 1),
            "others_cores": round(self.others_cores, 2),
            "losses": [round(loss, 5) for loss in self.losses],
        }


def time_steps(step: Callable[[], float], count: int) -> Timed:
    """Runs one warm-up step and `count` timed ones. `step` returns its loss when all is done."""
    losses, seconds = [], []
    busy = own = began = 0.0
    for i in range(count + 1):
        if i == 1:
            busy, own, began = _busy(), time.process_time(), time.perf_counter()
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    others = _busy() - busy - (time.process_time() - own)
    wall = time.perf_counter() - began
    return Timed(losses, seconds[0], seconds[1:], max(0.0, others / wall))


def _busy() -> float:
    """CPU seconds that this machine has spent on anything since it started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def surroundings(packages: Iterable[str]) -> dict[str, Any]:
    """Versions, processor and environment: what a figure depends on besides the code."""
    return {
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(TUNING)},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def show(figures: Mapping[str, Any], as_json: bool) -> None:
    """Prints a report: one line of JSON, or a name and a value a line."""
    if as_json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        items = value.items() if isinstance(value, Mapping) else ()
        text = ", ".join(f"{k} {v}" for k, v in items) if items else str(value)
        print(f"{name:{width}}  {text}")
