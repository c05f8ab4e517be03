"""Estimates the time of slow commands before they start.

A command consists of phases. The time of a phase is a rate times the phase's amounts. The rates
were measured on `MACHINE` and differ on other machines, so the user sees "an estimate".
"""

import math
from collections.abc import Mapping, Sequence

MACHINE = "2 CPU cores"
"""Machine on which the rates were measured: idle cores with AVX512-BF16, jax 0.10."""

SHORT = 5.0
"""Longest time in seconds for which no estimate is shown."""

SECONDS: Mapping[str, float] = {
    "start": 3.0,  # per process: start with jax
    "open": 4.0,  # per model: the programs that put its tensors in place
    "read": 7e-9,  # per parameter: into NF4
    "hash": 1e-8,  # per parameter
    "write": 3e-8,  # per parameter
    "data": 4.0,  # per data set: read and encode
    "compile": 6.0,  # per forward pass of a model
    "compile step": 12.0,
    "compile for a GPU": 15.0,
    "forward": 8e-12,  # per parameter and token
    "train": 3e-11,  # per parameter and token
    "token": 1.7e-10,  # per parameter and generated token
    "change": 0.03,  # per linear: compare its change with its rounding
    "shorten": 0.06,  # per linear: reduce its adapter to a lower rank
    "kernel": 0.7,  # per timed kernel call, with its share of the preparation
}
"""Rate of each phase: seconds for one of its amount."""

Phases = Sequence[tuple[str, ...]]

OPENED: Phases = [("open",), ("read", "parameters")]
PHASES: Mapping[str, Phases] = {
    "export": OPENED,
    "quantize": [*OPENED, ("write", "parameters")],
    "merge": [*OPENED, ("hash", "parameters"), ("write", "parameters")],
    "merge report": [
        ("data",),
        ("open", "ways"),
        ("read", "parameters", "ways"),
        ("compile", "ways"),
        ("forward", "parameters", "tokens", "ways"),
        ("change", "linears"),
    ],
    "combine": [("shorten", "linears")],
    "plan": [("compile for a GPU", "compilations")],
    "pretrain": [("data",), ("compile step",), ("train", "parameters", "tokens")],
    "bench kernels": [("start", "runs"), ("kernel", "calls", "runs")],
    "bench step": [
        ("start", "runs"),
        ("open", "runs"),
        ("read", "parameters", "runs"),
        ("compile step", "runs"),
        ("train", "parameters", "tokens", "runs"),
    ],
    "bench load": [("start", "runs"), ("open", "runs"), ("read", "parameters", "runs")],
    "bench generate": [
        ("start", "runs"),
        ("open", "runs"),
        ("read", "parameters", "runs"),
        ("compile step", "runs"),
        ("token", "parameters", "tokens", "runs"),
    ],
}
"""Phases of each command: the rate, then the names of the amounts."""


def seconds(works: Sequence[str], amounts: Mapping[str, float]) -> float:
    """Returns the expected total time of several commands, in seconds.

    Args:
      works: names of the commands, keys of `PHASES`.
      amounts: value of every amount that the phases of these commands name.
    """
    phases = [phase for work in works for phase in PHASES[work]]
    return sum(SECONDS[rate] * math.prod(amounts[a] for a in of) for rate, *of in phases)


def line(works: Sequence[str], **amounts: float) -> str | None:
    """Returns the line to print before the work; None if the work takes at most `SHORT`."""
    expected = seconds(works, amounts)
    if expected <= SHORT:
        return None
    return f"{works[0]}: about {about(expected)} on {MACHINE} (an estimate)"


def about(seconds: float) -> str:
    """Returns a rounded time with its unit, such as `40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
