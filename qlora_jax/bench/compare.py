"""Runs our benchmark and the peers' benchmarks in rounds, and summarizes the rounds.

Each run is a process of its own. A round runs our benchmark once and each peer's once, so that a
slow minute of the machine affects all sides. A ratio is ours / theirs within one round, because
ratios are less noisy than figures.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_jax.bench.measure import Figure, rounded
from qlora_jax.bench.options import Options
from qlora_jax.bench.tools import Tool, measured

Report = Mapping[str, Any]
Round = Sequence[Report]
"""Reports of one round, ours first."""


def round_of(
    tools: Sequence[Tool], what: str, options: Options, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Runs each tool once and returns the reports.

    The other tools get the options from the first report, which holds the device's defaults.

    Raises:
      UserError: see `tools.measured`.
      RunFailed: see `tools.measured`.
    """
    first, *others = tools
    reports = [measured(first, what, options, say)]
    for tool in others:
        reports.append(measured(tool, what, reports[0]["options"], say))
    return reports


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Returns medians, spreads and ratios over rounds that have the same tools in the same order.

    Returns:
      `columns`: labels; our label first, the variants of a side after its label. `rows`: one entry
      per figure of ours, with `figure`, `unit`, `case` if the figure has one, and `cells` and
      `ratios` by column label. `cells` and `ratios` omit a column that lacks the figure or one of
      its values. A cell has the `median` of the rounds' values, and `low` and `high`: the
      quartiles of all rounds' samples or, without samples, the smallest and the largest value. A
      ratio is ours / that column: `each` lists it for each round in order, and `median`, `low`
      and `high` summarize `each`.
    """
    columns = _columns(rounds[0])
    ours, *others = columns
    rows = []
    for name, figure in rounds[0][0]["figures"].items():
        found = {label: _figures(rounds, *place, name) for label, place in columns.items()}
        values = {label: _values(figures) for label, figures in found.items()}
        own = values[ours]
        if own is None:
            continue
        row = {
            "figure": name,
            "unit": figure["unit"],
            **({"case": figure["case"]} if "case" in figure else {}),
            "cells": {
                label: _cell(v, found[label]) for label, v in values.items() if v is not None
            },
            "ratios": {
                label: _spread(each) | {"each": each}
                for label in others
                if (each := _ratios(own, values[label])) is not None
            },
        }
        rows.append(row)
    return {"columns": list(columns), "rows": rows}


def _columns(reports: Round) -> dict[str, tuple[int, str | None]]:
    """Maps the label of each column to (index of the side, variant)."""
    columns: dict[str, tuple[int, str | None]] = {}
    for side, report in enumerate(reports):
        for variant in (None, *report.get("variants", {})):
            label = label_of(report) if variant is None else variant
            if label in columns:
                label = f"{label} ({side + 1})"
            columns[label] = (side, variant)
    return columns


def label_of(report: Report) -> str:
    """Returns a report's `label`, which distinguishes two sides of one tool, or its tool's name."""
    return report.get("label", report["tool"])


def _figures(rounds: Sequence[Round], side: int, variant: str | None, name: str) -> list[Figure]:
    reports = [reports[side] for reports in rounds]
    return [
        (r["figures"] if variant is None else r["variants"].get(variant, {})).get(name, {})
        for r in reports
    ]


def _values(figures: Sequence[Figure]) -> list[float] | None:
    values = [figure["value"] for figure in figures if figure.get("value") is not None]
    return values if len(values) == len(figures) else None


def _cell(values: Sequence[float], figures: Sequence[Figure]) -> dict[str, float]:
    cell = _spread(values)
    samples = [sample for figure in figures for sample in figure.get("samples", ())]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, method="inclusive")
        cell |= {"low": rounded(low), "high": rounded(high)}
    return cell


def _ratios(ours: Sequence[float], theirs: Sequence[float] | None) -> list[float] | None:
    if theirs is None or not all(theirs):
        return None
    return [rounded(a / b) for a, b in zip(ours, theirs)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": rounded(statistics.median(values)),
        "low": min(values),
        "high": max(values),
    }
