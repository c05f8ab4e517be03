"""Compares a report with targets; only measured figures can meet a target."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from qlora_jax.bench.gpu.report import Report

SHAPE = (4096, 11008)
DIRECTIONS = ("forward", "backward")
KERNEL, DECODE_FIRST, PEER = "mosaic", "xla", "bitsandbytes"
MIB = 2**20


class Target(NamedTuple):
    """One target for a figure of the report.

    Attributes:
      name: name of the measured quantity.
      wanted: target in words.
      value: function that gives the figure, or None if the report lacks data for it.
      met: function that says whether a figure meets the target.
    """

    name: str
    wanted: str
    value: Callable[[Report], float | None]
    met: Callable[[float], bool]


def rows(report: Report) -> Iterator[tuple[str, str, float, str]]:
    """Yields name, target, figure and verdict of every target with a figure in the report."""
    for target in TARGETS:
        value = target.value(report)
        if value is not None:
            yield target.name, target.wanted, value, "met" if target.met(value) else "missed"


def missing(report: Report) -> list[tuple[str, str]]:
    """Returns name and target of every target without a figure in the report."""
    return [(t.name, t.wanted) for t in TARGETS if t.value(report) is None]


def _wrong(report: Report) -> float | None:
    checks = [c for c in report["checks"] if c["part"] in ("products", "contexts")]
    return float(sum(not c["right"] for c in checks)) if checks else None


def _times(report: Report) -> dict[tuple[str, str, int], float]:
    return {
        (row["implementation"], row["direction"], row["rows"]): row["value"]
        for row in report["figures"]
        if row["field"] == "time" and (row["k"], row["n"]) == SHAPE
    }


def _slowest(*counts: int) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        times = _times(report)
        return _all(times.get((KERNEL, d, m)) for d in DIRECTIONS for m in counts)

    return value


def _against(other: str, *counts: int) -> Callable[[Report], float | None]:
    """Returns a function: the largest ratio of the kernel's time to the other's time."""

    def value(report: Report) -> float | None:
        times = _times(report)
        places = [(d, m) for d in DIRECTIONS for m in counts]
        pairs = [(times.get((KERNEL, *p)), times.get((other, *p))) for p in places]
        return _all(a / b if a and b else None for a, b in pairs)

    return value


def _speedup(other: str, count: int) -> Callable[[Report], float | None]:
    ratio = _against(other, count)

    def value(report: Report) -> float | None:
        found = ratio(report)
        return None if found is None else 1 / found

    return value


def _cases(report: Report) -> Mapping[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in report["figures"]:
        if "case" in row:
            found.setdefault(row["case"], {})[row["field"]] = row["value"]
    return found


def _from_plan(report: Report) -> float | None:
    cases = [c for c in _cases(report).values() if "peak" in c and "planned" in c]
    return max((abs(c["peak"] / c["planned"] - 1) for c in cases), default=None)


def _peak(prefix: str) -> Callable[[Report], float | None]:
    """Returns a function: the least peak, in GB, of the cases whose names have the prefix."""

    def value(report: Report) -> float | None:
        cases = _cases(report)
        peaks = [c["peak"] for name, c in cases.items() if name.startswith(prefix) and "peak" in c]
        return min(peaks, default=0) * MIB / 1e9 or None

    return value


def _step(report: Report) -> float | None:
    cases = _cases(report)
    speeds = [cases.get(name, {}).get("speed") for name in ("7B, 512 tokens", PEFT)]
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


def _all(values: Iterable[float | None]) -> float | None:
    """Returns the largest value; None if one is missing."""
    known = list(values)
    return None if None in known else max(x for x in known if x is not None)


PEFT = "PEFT, 7B, 512 tokens"
WHERE = f"W of {SHAPE[0]} x {SHAPE[1]}, NF4 with double quantization, both directions"
TARGETS = (
    Target("wrong products", "0", _wrong, lambda x: x == 0),
    Target(f"1, 4 and 16 rows, {WHERE}, us", "13 (H100)", _slowest(1, 4, 16), lambda x: x <= 13),
    Target("64 rows, times as fast as bitsandbytes", "3", _speedup(PEER, 64), lambda x: x >= 3),
    Target("512 rows, of decode + GEMM", "0.9", _against(DECODE_FIRST, 512), lambda x: x <= 0.9),
    Target(
        "2048 and 8192 rows, of decode + GEMM",
        "1.03",
        _against(DECODE_FIRST, 2048, 8192),
        lambda x: x <= 1.03,
    ),
    Target("peak memory, away from the plan", "0.03", _from_plan, lambda x: x <= 0.03),
    Target("65B, rank 64, 512 tokens, peak, GB", "48", _peak("65B, 512 tokens"), lambda x: x < 48),
    Target("7B step, times as fast as PEFT + bitsandbytes", "1.5", _step, lambda x: x >= 1.5),
)
