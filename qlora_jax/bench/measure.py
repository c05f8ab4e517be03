"""Measures time, memory and the machine in the same way for our side and for peers.

Imports neither jax nor torch, so that each side can import this module first and then measure the
time of its own imports.
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
"""Prefixes of the names of environment variables that change speed or memory."""

Figure = dict[str, Any]
"""`unit` and `value`; `samples` if there are several; `case` and rates from `case_figure`."""


def figure(unit: str, value: float | None, samples: Sequence[float] = ()) -> Figure:
    """Returns one measured number as a figure; `value` is None if the number is unknown."""
    made: Figure = {"unit": unit, "value": None if value is None else rounded(value)}
    return made | ({"samples": [rounded(s) for s in samples]} if samples else {})


def median_ms(seconds: Sequence[float]) -> Figure:
    """Returns the median of wall times in seconds as a figure in milliseconds."""
    return figure("ms", 1e3 * statistics.median(seconds), [1e3 * s for s in seconds])


def rounded(value: float) -> float:
    """Rounds to four significant digits; from 10000 on, to a whole number."""
    return float(f"{value:.4g}") if abs(value) < 1e4 else float(round(value))


def report(
    tool: str,
    packages: Iterable[str],
    options: Mapping[str, Any],
    figures: Mapping[str, Figure],
    **more: Any,
) -> dict[str, Any]:
    """Returns the report of one run: its figures, and what they depend on besides the code.

    Args:
      tool: name of the measured tool.
      packages: packages whose versions affect the figures.
      options: options of the benchmark, with defaults that depend on the device filled in.
      figures: name to figure; the same work has the same name on every side.
      **more: further entries: `variants` (label to figures of a variant), `others_cores`,
        `notes`, and results that show whether both sides did the same work (`losses`, `ids`).
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
    """Returns the results of `count` calls, each in seconds, after one warm-up call."""
    return [call() for _ in range(count + 1)][1:]


def timed(call: Callable[[], object]) -> float:
    """Calls a function and returns the wall-clock seconds that it takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class OtherProcesses:
    """A context that counts in `cores` the cores used by other processes; None if unknown."""

    cores: float | None = None

    def __enter__(self) -> OtherProcesses:
        self._began = _busy(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, began = self._began
        now = _busy()
        if busy is not None and now is not None:
            others = now - busy - (time.process_time() - own)
            self.cores = round(max(0.0, others / (time.perf_counter() - began)), 2)


class PeakMemory:
    """Peak resident memory of this process in MiB, in total and since the last `restart`."""

    def __init__(self) -> None:
        self._before = 0.0
        self._restarted = True

    def restart(self) -> None:
        """Starts a new phase; if the OS refuses, `phase` returns None from then on."""
        self._before = self.process()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._restarted = False

    def process(self) -> float:
        """Returns the peak since the process began."""
        peak = _status("VmHWM")
        return max(self._before, _maximum() if peak is None else peak)

    def phase(self) -> float | None:
        """Returns the peak since the last `restart`; None if the system reports none."""
        return _status("VmHWM") if self._restarted else None

    @staticmethod
    def now() -> float | None:
        """Returns the resident memory at this moment; None if the system reports none."""
        return _status("VmRSS")


def random_tokens(vocabulary: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns random token ids, int32 of `shape`; a seed gives every side the same ids."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)


def inputs_and_targets(
    vocabulary: int, batch: int, seq: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns random tokens and the token after each, both int32[batch, seq]."""
    ids = random_tokens(vocabulary, (batch, seq + 1), seed)
    return ids[:, :-1], ids[:, 1:]


def step_figures(seconds: Sequence[float], tokens: int) -> dict[str, Figure]:
    """Returns the figures of training steps of `tokens` tokens each."""
    median = statistics.median(seconds)
    return {
        "speed": figure("tokens/s", tokens / median, [tokens / s for s in seconds]),
        "step, median": median_ms(seconds),
        "step, quickest": figure("ms", 1e3 * min(seconds)),
    }


def answer_figures(
    times: Sequence[tuple[float, float]], written: int, rows: int = 1
) -> dict[str, Figure]:
    """Returns the figures of answers of `rows` x `written` tokens.

    Args:
      times: for each answer, the seconds from its start to its first and to its last token.
      written: generated tokens of each row, at least one.
      rows: rows that are generated at the same time.
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
    """Returns the CPU seconds of all processes since the machine started; None if unknown."""
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
