"""How long slow work takes, told before it starts.

The rates are measured ones, of the machine `MACHINE`; other machines differ, so that all that is
made of them is called an estimate.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

MACHINE = "2 CPU cores"
"""Where the rates were measured: AMD EPYC with AVX512-BF16, jax 0.10, otherwise idle."""

SHORT = 5.0
"""Seconds up to which nothing is told."""


class Phase(NamedTuple):
    """A part of a command's work.

    Attributes:
      rate: a key of `SECONDS`.
      amount: how many units of it.
    """

    rate: str
    amount: float = 1


SECONDS: Mapping[str, float] = {
    "start": 3,
    "read": 2.4e-8,
    "read the data": 4,
    "hash": 1.2e-8,
    "forward": 1.05e-11,
    "compile a model": 7,
    "quantize and write": 4e-8,
    "merge and write": 6e-8,
    "measure a linear": 3e-2,
    "compile for a GPU": 12,
    "compile a step": 12,
    "train": 4e-11,
    "run a benchmark": 20,
}
"""Seconds of a unit: of a start, a data set, a compilation, a linear or a run; of a parameter where
weights are read, hashed or written; of a parameter and a token where a model runs or trains."""


def seconds(phases: Sequence[Phase]) -> float:
    """The time that phases take, one after the other."""
    return sum(SECONDS[phase.rate] * phase.amount for phase in phases)


def line(what: str, phases: Sequence[Phase]) -> str | None:
    """The line to print before the work starts; None where it is short."""
    expected = seconds(phases)
    return f"{what}: about {about(expected)} on {MACHINE} (estimate)" if expected > SHORT else None


def about(seconds: float) -> str:
    """A time to one or two digits, such as `40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
