"""Draws summaries: times of products over the rows M, and other figures as ratios to peers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.runtime.errors import UserError

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


def save(summaries: Mapping[str, Summary], path: Path) -> None:
    """Draws named summaries into one PNG.

    Args:
      summaries: name to a result of `compare.summarize`.
      path: path of the PNG file.

    Raises:
      UserError: there is nothing to draw, or the file cannot be written.
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
    """Returns title, columns and rows of each panel of a summary."""
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
    for color, label in enumerate(columns):
        points = [(r["case"]["rows"], r["cells"][label]) for r in rows if label in r["cells"]]
        if points:
            x, cells = zip(*points)
            y = [cell["median"] for cell in cells]
            axes.errorbar(x, y, _reach(cells), marker="o", color=f"C{color}", label=label, **_STYLE)
    ticks = sorted({row["case"]["rows"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="rows M", ylabel="ms, median")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bars(axes: Any, columns: Sequence[str], rows: Sequence[Row]) -> None:
    for color, label in enumerate(columns[1:], 1):
        points = [(y, r["ratios"][label]) for y, r in enumerate(rows) if label in r["ratios"]]
        if points:
            places, ratios = zip(*points)
            x = [ratio["median"] for ratio in ratios]
            y = [place + 0.12 * (color - 1) for place in places]
            axes.errorbar(
                x, y, xerr=_reach(ratios), fmt="o", color=f"C{color}", label=label, **_STYLE
            )
    axes.axvline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="ours / theirs")
    axes.set_yticks(range(len(rows)), [f"{r['figure']}, {r['unit']}" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x", which="both")
    axes.legend(fontsize=8)


_STYLE = {"markersize": 4, "capsize": 2}


def _reach(spreads: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Returns the error bars below and above each median; 0 if the quartiles are beyond it."""
    return [
        [max(0.0, s["median"] - s["low"]) for s in spreads],
        [max(0.0, s["high"] - s["median"]) for s in spreads],
    ]
