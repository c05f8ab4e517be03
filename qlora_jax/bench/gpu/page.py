"""Formats a report as Markdown, and draws it as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.bench.gpu import targets
from qlora_jax.bench.gpu.report import Report, last_line

OURS = ("mosaic", "triton", "xla")
SHOWN = (*OURS, "gemm", "bitsandbytes")
"""Implementations in the tables of times, in this order."""

REHEARSED = "**Rehearsed on a CPU with tiny shapes: no figure below says how fast anything is.**"

LISTED = 20
"""Largest number of wrong checks and of results lost to errors that are listed."""


def text(report: Report) -> str:
    """Returns the report as Markdown: device, parts, checks, targets, figures, absent results."""
    sections = [
        f"## {report['device']}",
        _facts(report),
        REHEARSED if report["backend"] == "cpu" else "",
        _table(
            ("part", "seconds", "outcome", "right", "wrong", "absent"),
            [_part(report, part) for part in report["parts"]],
        ),
        last_line(report, report["backend"] == "cpu") + ".",
        _wrong(report),
        target_table(report) if report["backend"] == "gpu" else "",
        _figures(report, "ceilings", "Ceilings"),
        *_times(report),
        *_cases(report),
        *(_figures(report, part, title) for part, title in _REST.items()),
        _top(report),
        _absent(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def target_table(report: Report) -> str:
    """Returns the targets as a table; a target without a figure is listed as not measured."""
    body = [(name, wanted, _number(x), word) for name, wanted, x, word in targets.rows(report)]
    body += [(name, wanted, "", "not measured") for name, wanted in targets.missing(report)]
    return "### Targets\n\n" + _table(("what", "target", "measured", ""), body)


_REST = {"decode": "Generation", "training": "Whole runs", "traces": "Traces"}


def _facts(report: Report) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    commit = report.get("commit") or {}
    state = " with changes" if commit.get("modified") else ""
    parts = [f"Command: `{report['command']}`. Versions: {versions}."]
    if commit:
        parts.append(f"Commit {commit['commit'][:10]}{state}.")
    if "driver_version" in report:
        limit = report.get("power.limit", "not told")
        parts.append(f"Driver {report['driver_version']}, power limit {limit}.")
    return " ".join(parts)


def _part(report: Report, part: Mapping[str, Any]) -> list[Any]:
    def count(kind: str, **wanted: Any) -> int:
        rows = [row for row in report[kind] if row["part"] == part["name"]]
        return sum(all(row[k] == v for k, v in wanted.items()) for row in rows)

    right, wrong = (count("checks", right=value) for value in (True, False))
    return [part["name"], part["seconds"], part["outcome"], right, wrong, count("absent")]


def _wrong(report: Report) -> str:
    rows = [check for check in report["checks"] if not check["right"]]
    rows += [row for row in report["absent"] if row.get("error")]
    if not rows:
        return ""
    lines = [f"- {row['part']}: {row['name']}: {_details(row)}" for row in rows[:LISTED]]
    more = [f"- and {len(rows) - LISTED} more"] if len(rows) > LISTED else []
    return "\n".join(["Wrong:", "", *lines, *more])


def _details(row: Mapping[str, Any]) -> str:
    left_out = ("part", "name", "right", "losses")
    return ", ".join(f"{k} {_number(v)}" for k, v in row.items() if k not in left_out)


def _figures(report: Report, part: str, title: str) -> str:
    rows = [row for row in report["figures"] if row["part"] == part]
    if not rows:
        return ""
    body = [(row["name"], _number(row["value"]), row["unit"]) for row in rows]
    return f"### {title}\n\n" + _table(("what", "value", "unit"), body)


def _times(report: Report) -> Iterable[str]:
    """Yields a table per shape and direction: microseconds, and rates of the fastest."""
    timed = [row for row in report["figures"] if row["field"] == "time"]
    groups = dict.fromkeys((row["k"], row["n"], row["direction"]) for row in timed)
    for k, n, direction in groups:
        rows = [r for r in timed if (r["k"], r["n"], r["direction"]) == (k, n, direction)]
        known = [name for name in SHOWN if any(r["implementation"] == name for r in rows)]
        body = []
        for m in sorted({r["rows"] for r in rows}):
            by_name = {r["implementation"]: r for r in rows if r["rows"] == m}
            ours = [
                by_name[name] for name in known[:3] if name in by_name and "GB/s" in by_name[name]
            ]
            best: Mapping[str, Any] = min(ours, key=lambda r: r["value"], default={})
            cells = [_number(by_name.get(name, {}).get("value")) for name in known]
            body.append([m, *cells, _number(best.get("GB/s")), _number(best.get("TFLOP/s"))])
        head = ("rows", *known, "GB/s of the quickest", "TFLOP/s")
        yield f"### {direction}, W of {k} x {n}, microseconds\n\n" + _table(head, body)


def _cases(report: Report) -> Iterable[str]:
    """Yields a table of the training steps, with planned and measured memory."""
    rows = [row for row in report["figures"] if row["part"] in ("steps", "large", "peers")]
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if "case" in row:
            cases.setdefault(row["case"], {})[row["field"]] = row["value"]
    if not cases:
        return
    body = []
    for name, found in cases.items():
        peak, planned = found.get("peak"), found.get("planned")
        ratio = peak / planned if peak and planned else None
        gib = [None if x is None else x / 1024 for x in (peak, planned)]
        values = (found.get("speed"), found.get("step"), found.get("update"), *gib, ratio)
        body.append([name, *map(_number, values)])
    head = ("step", "tokens/s", "ms", "update, ms", "peak, GiB", "planned, GiB", "peak / planned")
    yield "### Training steps\n\n" + _table(head, body)


def _top(report: Report) -> str:
    parts = []
    for row in report["figures"]:
        if "top" in row:
            body = [(f"`{name}`", _number(us), count) for name, us, count in row["top"]]
            parts.append(f"### {row['name']}\n\n" + _table(("kernel", "us", "launches"), body))
    return "\n\n".join(parts)


def _absent(report: Report) -> str:
    """Returns a table of the reasons for absent results, with the number of results of each."""
    if not report["absent"]:
        return ""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in report["absent"]:
        reasons.setdefault((row["part"], row["reason"]), []).append(row["name"])
    body = [(part, len(own), own[0], reason) for (part, reason), own in reasons.items()]
    return "### Not measured\n\n" + _table(("part", "results", "the first", "reason"), body)


def picture(report: Report, path: Path) -> None:
    """Draws times over rows, one panel per shape and direction, and memory against the plan.

    Writes no file if the report has neither times nor memory.
    """
    import matplotlib.figure

    timed = [row for row in report["figures"] if row["field"] == "time"]
    groups = list(dict.fromkeys((row["k"], row["n"], row["direction"]) for row in timed))
    memory = _memory(report)
    panels = len(groups) + bool(memory)
    if not panels:
        return
    down = -(-panels // 2)
    figure = matplotlib.figure.Figure(figsize=(12, 3.6 * down), layout="constrained")
    grid = list(figure.subplots(down, 2, squeeze=False).flat)
    for axes, group in zip(grid, groups):
        _lines(axes, group, [r for r in timed if (r["k"], r["n"], r["direction"]) == group])
    if memory:
        _bars(grid[len(groups)], memory)
    for axes in grid[panels:]:
        axes.remove()
    rehearsed = " (rehearsed: no figure is a speed)" if report["backend"] == "cpu" else ""
    figure.suptitle(report["device"] + rehearsed)
    figure.savefig(path, dpi=110)


def _lines(axes: Any, group: tuple[int, int, str], rows: Sequence[Mapping[str, Any]]) -> None:
    for name in SHOWN:
        own = sorted((r["rows"], r["value"]) for r in rows if r["implementation"] == name)
        if own:
            axes.plot(*zip(*own), marker="o", label=name)
    k, n, direction = group
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="microseconds")
    axes.set_title(f"{direction}, W of {k} x {n}", fontsize=10)
    axes.legend(fontsize=8)


def _memory(report: Report) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in report["figures"]:
        if row["field"] in ("peak", "planned") and "case" in row:
            found.setdefault(row["case"], {})[row["field"]] = row["value"] / 1024
    return found


def _bars(axes: Any, memory: Mapping[str, Mapping[str, float]]) -> None:
    known = [
        kind for kind in ("planned", "peak") if any(kind in found for found in memory.values())
    ]
    for i, kind in enumerate(known):
        places = [place + 0.4 * i for place in range(len(memory))]
        axes.barh(places, [found.get(kind, 0) for found in memory.values()], 0.4, label=kind)
    axes.set_yticks([place + 0.2 for place in range(len(memory))], list(memory), fontsize=8)
    axes.set_title("device memory of a step, GiB", fontsize=10)
    axes.legend(fontsize=8)


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
