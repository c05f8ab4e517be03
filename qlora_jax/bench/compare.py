"""Rounds of runs that alternate, and what they add up to.

Each run is a process of its own; one of ours, one of each peer's, and again, so that a slow minute
of the machine falls on all. Ratios are ours / theirs within a round: less noisy than figures.
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
    """One run of each tool. The first settles options that depend on the device.

    Raises:
      UserError: see `tools.measured`.
      RunFailed: likewise.
    """
    first, *others = tools
    reports = [measured(first, what, options, say)]
    for tool in others:
        reports.append(measured(tool, what, reports[0]["options"], say))
    return reports


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, spread and ratios over rounds of the same sides.

    Returns:
      `columns`: labels, ours first, variants of a side after it. `rows`, one per figure of ours:
      `figure`, `unit`, `case` where it has one, and per column label `cells` and `ratios`; a column
      is absent where it lacks the figure or its value is not known. A cell has the `median` of the
      rounds' values, `low` and `high`: quartiles of all rounds' samples, or without samples the
      least and greatest value. A ratio is ours / that column, `each` round in order, with the
      `median`, `low` and `high` of these.
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
    """Label to (side, variant)."""
    columns: dict[str, tuple[int, str | None]] = {}
    for side, report in enumerate(reports):
        for variant in (None, *report.get("variants", {})):
            label = label_of(report) if variant is None else variant
            if label in columns:
                label = f"{label} ({side + 1})"
            columns[label] = (side, variant)
    return columns


def label_of(report: Report) -> str:
    """Whose figures, and what tells this side from another of the same tool."""
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
