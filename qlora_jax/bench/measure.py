"""Time, memory and machine, measured alike on our side and on a peer's.

Imports neither jax nor torch, so that both sides can import it first and count their own imports.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STARTED = time.perf_counter()

TUNING = ("XLA_", "JAX_", "OMP_", "MKL_", "ONEDNN_", "GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")
"""Starts of the names of environment variables that change speed or memory."""

Figure = dict[str, Any]
"""`unit` and `value`; where several times were taken their `samples`; what `cases` adds."""


def figure(unit: str, value: float | None, samples: Sequence[float] = ()) -> Figure:
    """One measured number; `value` is None where it could not be known."""
    made: Figure = {"unit": unit, "value": None if value is None else rounded(value)}
    return made | ({"samples": [rounded(s) for s in samples]} if samples else {})


def median_ms(seconds: Sequence[float]) -> Figure:
    """The median of wall times in seconds, as a figure in milliseconds."""
    return figure("ms", 1e3 * statistics.median(seconds), [1e3 * s for s in seconds])


def rounded(value: float) -> float:
    """To four significant digits; whole numbers of more keep theirs."""
    return float(f"{value:.4g}") if abs(value) < 1e4 else float(round(value))


def report(
    tool: str,
    packages: Iterable[str],
    options: Mapping[str, Any],
    figures: Mapping[str, Figure],
    **more: Any,
) -> dict[str, Any]:
    """What one run prints: its figures, and all that they depend on besides the code.

    Args:
      tool: whose figures these are.
      packages: whose versions matter.
      options: of the benchmark, with defaults that depend on the device filled in.
      figures: name to figure; the same name for the same work on every side.
      **more: further entries: `variants` (label to figures measured beside), `others_cores`,
        `notes`, and what says that both sides did the same (`losses`, `ids`).
    """
    return {
        "tool": tool,
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "machine": {"cpu": _cpu(), "cores": _cores()},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(TUNING)},
        "options": dict(options),
        "figures": dict(figures),
        **more,
    }


def take(call: Callable[[], float], count: int) -> list[float]:
    """`count` of the seconds that `call` tells, after one call to warm up."""
    return [call() for _ in range(count + 1)][1:]


def timed(call: Callable[[], object]) -> float:
    """Seconds of wall clock that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Neighbours:
    """How many cores other processes kept busy within a `with`; None where the system hides it."""

    cores: float | None = None

    def __enter__(self) -> Neighbours:
        self._began = _busy(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, began = self._began
        now = _busy()
        if busy is not None and now is not None:
            others = now - busy - (time.process_time() - own)
            self.cores = round(max(0.0, others / (time.perf_counter() - began)), 2)


class PeakMemory:
    """Peak resident memory of this process in MiB, whole and since the last `restart`."""

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
        peak = _status("VmHWM")
        return max(self._before, _maximum() if peak is None else peak)

    def phase(self) -> float | None:
        """Since the last `restart`; None where the system does not tell."""
        return _status("VmHWM") if self._restarted else None

    @staticmethod
    def now() -> float | None:
        """Resident at this moment; None where the system does not tell."""
        return _status("VmRSS")


def random_tokens(vocabulary: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Token ids, int32 of `shape`: the same on every side for the same seed."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)


def inputs_and_targets(
    vocabulary: int, batch: int, seq: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and what follows each, int32[batch, seq]."""
    ids = random_tokens(vocabulary, (batch, seq + 1), seed)
    return ids[:, :-1], ids[:, 1:]


def step_figures(seconds: Sequence[float], tokens: int) -> dict[str, Figure]:
    """Of training steps of `tokens` tokens each."""
    median = statistics.median(seconds)
    return {
        "speed": figure("tokens/s", tokens / median, [tokens / s for s in seconds]),
        "step, median": median_ms(seconds),
        "step, quickest": figure("ms", 1e3 * min(seconds)),
    }


def answer_figures(
    times: Sequence[tuple[float, float]], written: int, rows: int = 1
) -> dict[str, Figure]:
    """Of answers of `rows` times `written` tokens.

    Args:
      times: per answer, seconds from its start to its first token and to its last.
      written: tokens of each row, at least one.
      rows: that are written at one time.
    """
    figures = {"prefill": median_ms([first for first, _ in times])}
    if written > 1:
        speeds = [rows * (written - 1) / (last - first) for first, last in times]
        figures["decode"] = figure("tokens/s", statistics.median(speeds), speeds)
    return figures


def _status(field: str) -> float | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return round(int(line.split()[1]) / 1024, 1)
    except OSError:
        pass
    return None


def _maximum() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _busy() -> float | None:
    """CPU seconds that this machine has spent on anything since it started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
