"""Analyses the records of a sweep and writes its table, page, pictures and verdict."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.runtime.atomic import atomic_write, write_text
from qlora_jax.runtime.errors import RunFailed, UserError, first_line
from qlora_jax.sweep import table
from qlora_jax.sweep.experiment import SEED, Analysis, Experiment, text
from qlora_jax.sweep.record import DONE, CellRecord
from qlora_jax.sweep.results import write_parquet

PAGE = "analysis.md"
VERDICT = "verdict.json"


def conclude(
    experiment: Experiment, records: Mapping[str, CellRecord], out: Path
) -> dict[str, Any] | None:
    """Writes results.parquet, analysis.md, its pictures and verdict.json.

    Returns:
      The content of verdict.json: experiment, question, paper, ours, interval and verdict. None if
      no cell is done, because then there is nothing to analyse.

    Raises:
      UserError: the folder cannot be written.
      RunFailed: the experiment's analysis failed.
    """
    write_parquet(out, records.values())
    if not any(record.status == DONE for record in records.values()):
        return None
    try:
        analysis = experiment.analyse(table.table_of(arranged(experiment, records.values())))
    except (RunFailed, UserError):
        raise
    except Exception as e:
        done = sum(record.status == DONE for record in records.values())
        raise RunFailed(
            f"{experiment.name}: the analysis failed, {type(e).__name__}: {first_line(e)}; it may "
            f"need cells that are not run ({done} of {len(experiment.cells())} are done); the "
            "results are kept: --analyse-only repeats the analysis"
        ) from e
    verdict = _verdict(experiment, analysis)
    for name, figure in analysis.pictures.items():
        with atomic_write(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight")
    write_text(out / PAGE, _page(experiment, analysis, records))
    write_text(out / VERDICT, json.dumps(verdict, indent=2, allow_nan=False) + "\n")
    return verdict


def arranged(experiment: Experiment, records: Iterable[CellRecord]) -> list[CellRecord]:
    """Returns the records in the order of the axes' values; the seed varies fastest."""
    places = {
        axis: {text(value): place for place, value in enumerate(values)}
        for axis, values in experiment.axes.items()
    }

    def place(record: CellRecord) -> list[int]:
        of_axes = [own.get(text(record.values.get(axis)), len(own)) for axis, own in places.items()]
        return [*of_axes, record.values.get(SEED, 0)]

    return sorted(records, key=place)


def _verdict(experiment: Experiment, analysis: Analysis) -> dict[str, Any]:
    interval = analysis.verdict.interval
    ends = (interval.low, interval.high) if interval else ()
    return {
        "experiment": experiment.name,
        "question": experiment.question,
        "paper": experiment.paper,
        "ours": analysis.verdict.ours,
        "interval": [end if math.isfinite(end) else None for end in ends] or None,
        "verdict": analysis.verdict.verdict,
    }


def _page(experiment: Experiment, analysis: Analysis, records: Mapping[str, CellRecord]) -> str:
    verdict = analysis.verdict
    lines = [
        f"# {experiment.name}",
        experiment.question,
        f"- Paper: {experiment.paper}",
        f"- Expected: {experiment.expected}",
        f"- Ours: {verdict.ours}" + (f"; {verdict.interval}" if verdict.interval else ""),
        f"- Verdict: **{verdict.verdict}**",
    ]
    parts = ["\n".join([lines[0], "", lines[1], "", *lines[2:]])]
    parts += [f"## {title}\n\n{text}" for title, text in analysis.tables.items()]
    parts += [f"![{name}]({name}.png)" for name in analysis.pictures]
    missing = [
        {**record.values, "status": record.status, "why": record.error}
        for record in records.values()
        if record.status != DONE
    ]
    if missing:
        parts.append(f"## Cells without a result\n\n{table.markdown(missing)}")
    return "\n\n".join(parts) + "\n"
