"""How long slow commands take, told before they start.

A command is phases; a phase is a rate and the amounts that it is multiplied by. The rates are of
`MACHINE`, and other machines differ: what is told is called an estimate.
"""

import math
from collections.abc import Mapping, Sequence

MACHINE = "2 CPU cores"
"""Where the rates were measured: cores with AVX512-BF16, jax 0.10, otherwise idle."""

SHORT = 5.0
"""Seconds up to which nothing is told."""

SECONDS: Mapping[str, float] = {
    "start": 3.0,  # a process with jax
    "open": 4.0,  # a model: the programs that bring its tensors into their places
    "read": 7e-9,  # a parameter, into NF4
    "hash": 1e-8,  # a parameter
    "write": 3e-8,  # a parameter
    "data": 4.0,  # reading and encoding a data set
    "compile": 6.0,  # a model's forward pass
    "compile step": 12.0,
    "compile for a GPU": 15.0,
    "forward": 8e-12,  # a parameter and token
    "train": 3e-11,  # a parameter and token
    "token": 1.7e-10,  # a parameter and written token
    "change": 0.03,  # a linear's change against its rounding
    "shorten": 0.06,  # a linear's adapter, to a lower rank
    "kernel": 0.7,  # a timed call of a kernel, with its share of preparing the case
}
"""Seconds of one unit of each phase."""

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
"""The phases of each command, with the names of their amounts."""


def seconds(works: Sequence[str], amounts: Mapping[str, float]) -> float:
    """The time that commands take, one after the other.

    Args:
      works: keys of `PHASES`.
      amounts: every amount that their phases name.
    """
    phases = [phase for work in works for phase in PHASES[work]]
    return sum(SECONDS[rate] * math.prod(amounts[a] for a in of) for rate, *of in phases)


def line(works: Sequence[str], **amounts: float) -> str | None:
    """The line to print before the work; None where it is short."""
    expected = seconds(works, amounts)
    if expected <= SHORT:
        return None
    return f"{works[0]}: about {about(expected)} on {MACHINE} (an estimate)"


def about(seconds: float) -> str:
    """A time to one or two digits, such as `40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
