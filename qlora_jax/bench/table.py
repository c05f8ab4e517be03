"""Formats summaries as Markdown tables that are readable on a terminal too."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(summary: Mapping[str, Any]) -> str:
    """Returns a Markdown table with a row per figure: medians first, then ratios.

    A median is followed by ± half its spread in percent, a ratio by its low and high.

    Args:
      summary: result of `compare.summarize`.
    """
    columns = summary["columns"]
    others = columns[1:]
    header = ["median", *columns, *(f"ours / {label}" for label in others)]
    rows = [header, ["---"] * len(header)]
    for row in summary["rows"]:
        cells = [_cell(row["cells"].get(label)) for label in columns]
        ratios = [_ratio(row["ratios"].get(label)) for label in others]
        rows.append([f"{row['figure']}, {row['unit']}", *cells, *ratios])
    return "\n".join(_aligned(rows))


def remarks(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Returns remarks on the runs: device, versions, busy cores, equality of results, notes."""
    first = rounds[0]
    lines = [f"{len(rounds)} round{'s' * (len(rounds) > 1)} on {first[0]['device']}"]
    for report in first:
        versions = [f"{name} {version}" for name, version in report["versions"].items()]
        if git := report.get("git"):
            versions.append(f"commit {git['commit'][:10]}{' with changes' * git['modified']}")
        settings = [f"{name}={value}" for name, value in report.get("environment", {}).items()]
        lines.append(f"{report.get('label', report['tool'])}: {', '.join(versions + settings)}")
    busy = [r["others_cores"] for reports in rounds for r in reports if r["others_cores"]]
    if busy:
        lines.append(f"cores that other processes kept busy, at most: {max(busy)}")
    if len(first) > 1 and "losses" in first[0]:
        losses = ", ".join(f"{r['losses'][0]:.4f}" for r in first)
        lines.append(f"loss of the first step on the same tokens: {losses}")
    if len(first) > 1 and "ids" in first[0]:
        for report in first[1:]:
            same = _common(first[0]["ids"], report["ids"])
            lines.append(f"tokens equal to those of {report['tool']}: the first {same}")
    notes = [note for reports in rounds for r in reports for note in r.get("notes", ())]
    return lines + list(dict.fromkeys(notes))


def _cell(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return ""
    spread = cell["high"] - cell["low"]
    percent = f" ±{50 * spread / cell['median']:.0f}%" if spread and cell["median"] else ""
    return f"{_short(cell['median'])}{percent}"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    low, high = _short(ratio["low"]), _short(ratio["high"])
    return _short(ratio["median"]) + (f" ({low} to {high})" if low != high else "")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
