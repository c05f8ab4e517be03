"""Summaries as a picture: products over M, and everything else as ratios to the peers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


def save(summaries: Mapping[str, Summary], path: Path) -> None:
    """Draws named summaries into one PNG.

    Args:
      summaries: name to what `compare.summarize` gives.
      path: of the file.

    Raises:
      UserError: nothing to draw, or the file cannot be written.
    """
    import matplotlib.figure

    panels = [panel for name, summary in summaries.items() for panel in panels_of(name, summary)]
    if not panels:
        raise UserError("--plot: no product was timed and no peer given; leave it out")
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = matplotlib.figure.Figure(figsize=(6.5 * across, 3.8 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (title, columns, rows) in zip(grid.flat, panels):
        (_lines if rows[0].get("case", {}).get("rows") else _bars)(axes, columns, rows)
        axes.set_title(title, fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    try:
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise UserError(f"--plot {path}: cannot be written: {e.strerror}") from None


def panels_of(name: str, summary: Summary) -> list[tuple[str, Sequence[str], list[Row]]]:
    """Title, columns and rows of each panel that a summary gives."""
    products: dict[str, list[Row]] = {}
    others = []
    for row in summary["rows"]:
        case = row.get("case", {})
        if case.get("rows"):
            title = f"{case['operation']}, {case['k']} x {case['n']}, {case['dtype']}"
            products.setdefault(title, []).append(row)
        elif row["ratios"]:
            others.append(row)
    panels = [(title, summary["columns"], rows) for title, rows in products.items()]
    return panels + ([(name, summary["columns"], others)] if others else [])


def _lines(axes: Any, columns: Sequence[str], rows: Sequence[Row]) -> None:
    for label in columns:
        points = [(r["case"]["rows"], r["cells"][label]) for r in rows if label in r["cells"]]
        if not points:
            continue
        x = [m for m, _ in points]
        y = [cell["median"] for _, cell in points]
        spread = [
            [c["median"] - c["low"] for _, c in points],
            [c["high"] - c["median"] for _, c in points],
        ]
        axes.errorbar(x, y, spread, marker="o", markersize=4, capsize=2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rows M", ylabel="ms, median")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bars(axes: Any, columns: Sequence[str], rows: Sequence[Row]) -> None:
    for i, label in enumerate(columns[1:]):
        points = [(y, r["ratios"][label]) for y, r in enumerate(rows) if label in r["ratios"]]
        if not points:
            continue
        y = [place + 0.15 * i for place, _ in points]
        x = [ratio["median"] for _, ratio in points]
        spread = [
            [r["median"] - r["low"] for _, r in points],
            [r["high"] - r["median"] for _, r in points],
        ]
        axes.errorbar(x, y, xerr=spread, fmt="o", markersize=5, capsize=2, label=label)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="ours / theirs")
    axes.set_yticks(range(len(rows)), [f"{r['figure']}, {r['unit']}" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x", which="both")
    axes.legend(fontsize=8)
