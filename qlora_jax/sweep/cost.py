"""Finds which cells of a sweep are still to run, and estimates how long they take."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.runtime import manifest, paths
from qlora_jax.runtime.device import cpu_cores, cpu_name
from qlora_jax.runtime.time_estimates import about
from qlora_jax.sweep.experiment import Cell, Estimate, Experiment
from qlora_jax.sweep.record import DONE, CellRecord
from qlora_jax.sweep.results import NAME, read
from qlora_jax.sweep.run import unfinished_cells, unfinished_groups


class RemainingWork(NamedTuple):
    """The remaining work of a sweep over the chosen cells.

    Attributes:
      records: id of a cell to its record, for all cells in the folder.
      reasons: id of a chosen cell that cannot run, to the reason.
      left: cells that are not finished.
      tasks: groups of cells that run together. If one cell of a group is unfinished, the whole
        group runs, including its finished cells.
    """

    records: Mapping[str, CellRecord]
    reasons: Mapping[str, str]
    left: Sequence[Cell]
    tasks: Sequence[Sequence[Cell]]

    @property
    def running(self) -> list[Cell]:
        """The cells of all tasks."""
        return [cell for task in self.tasks for cell in task]


class CellTime(NamedTuple):
    """The estimated time and memory of the cells that are to run.

    Attributes:
      seconds: wall-clock seconds. If several tasks run at a time, this is a lower bound, because
        they share the cores.
      memory_bytes: peak memory by the experiment's estimate; 0 if the experiment declares none.
      measured: number of cells with a time from finished cells of their kind.
      declared: number of cells with a time from the experiment's estimate.
      unknown: number of cells without a time; `seconds` does not include them.
    """

    seconds: float
    memory_bytes: int
    measured: int
    declared: int
    unknown: int

    @property
    def source(self) -> str | None:
        """Source of `seconds`: `measured`, `declared`, `measured and declared`, or None."""
        used = [name for name in ("measured", "declared") if getattr(self, name)]
        return " and ".join(used) or None


def work(
    experiment: Experiment, cells: Sequence[Cell], out: Path, retry_failed: bool = False
) -> RemainingWork:
    """Finds what a sweep over these cells would run; writes nothing.

    Args:
      experiment: experiment of the cells.
      cells: chosen cells.
      out: folder of the results; it need not exist.
      retry_failed: whether failed cells count as unfinished.

    Raises:
      UserError: `results.read` fails.
    """
    records = read(out, experiment) if paths.is_file(out / NAME) else {}
    reasons = {cell.id: reason for cell in cells if (reason := experiment.skip(cell))}
    able = [cell for cell in cells if cell.id not in reasons]
    waiting = unfinished_cells(able, records, retry_failed)
    return RemainingWork(
        records, reasons, waiting, unfinished_groups(able, waiting, records, experiment.population)
    )


def time_of(experiment: Experiment, found: RemainingWork, out: Path, jobs: int = 1) -> CellTime:
    """Estimates how long the tasks take.

    The time of a cell is the mean time of the finished cells of its kind, if there are any and this
    machine ran all sessions of this folder; else it is the experiment's estimate. Two cells are of
    one kind if the experiment estimates the same time and memory for them. If an experiment
    estimates nothing, all its cells are of one kind.

    Args:
      experiment: experiment of the cells.
      found: remaining work.
      out: folder of the results.
      jobs: largest number of tasks at a time.
    """
    known = _measured(experiment, found.records) if _ran_here(out) else {}
    declared = experiment.estimate or _unknown
    measured_cells = declared_cells = unknown = memory = 0
    times = []
    for task in found.tasks:
        seconds = 0.0
        for cell in task:
            estimate = declared(cell)
            if estimate in known:
                measured_cells += 1
                seconds += known[estimate]
            elif estimate:
                declared_cells += 1
                seconds += estimate.seconds
            else:
                unknown += 1
            memory = max(memory, estimate.memory_bytes if estimate else 0)
        times.append(seconds)
    at_a_time = min(jobs, max(len(times), 1))
    total = max(sum(times) / at_a_time, max(times, default=0.0))
    return CellTime(total, memory * at_a_time, measured_cells, declared_cells, unknown)


def sentence(found: CellTime, jobs: int = 1) -> str:
    """Returns the estimated time and its source in words; at least one cell must be to run."""
    parts = {
        "finished cells of their kind, measured on this machine": found.measured,
        "the experiment's own estimate, not measured on this machine": found.declared,
    }
    used = {source: number for source, number in parts.items() if number}
    if not used:
        return "time: not known; no such cell is finished here, and the experiment estimates none"
    by = " and ".join(
        f"{source} ({number:,} cells)" if len(used) > 1 else source
        for source, number in used.items()
    )
    more = f"; without {found.unknown:,} cells of unknown time" if found.unknown else ""
    memory = f", {found.memory_bytes / 2**30:.1f} GiB" if found.memory_bytes else ""
    best = f" at best, {jobs} at a time" if jobs > 1 else ""
    return f"time: about {about(found.seconds)}{best}{memory}, by {by}{more}"


def total_cost_text(experiment: Experiment) -> str:
    """Returns the cost of the whole experiment in words, from its `estimate` and its `cost`."""
    cells = [cell for cell in experiment.cells() if not experiment.skip(cell)]
    estimates = [experiment.estimate(cell) for cell in cells] if experiment.estimate else []
    if not estimates or None in estimates:
        return f"{len(cells):,} cells; {experiment.cost}"
    seconds = sum(estimate.seconds for estimate in estimates if estimate)
    return f"{len(cells):,} cells, about {about(seconds)} by its own estimate; {experiment.cost}"


def _unknown(cell: Cell) -> Estimate | None:
    return None


def _measured(
    experiment: Experiment, records: Mapping[str, CellRecord]
) -> dict[Estimate | None, float]:
    """Returns the mean seconds of finished cells, by kind."""
    times: dict[Estimate | None, list[float]] = {}
    declared = experiment.estimate or _unknown
    for record in records.values():
        if record.status == DONE:
            kind = declared(experiment.cell(record.values))
            times.setdefault(kind, []).append(record.wall_s)
    return {kind: statistics.fmean(own) for kind, own in times.items()}


def _ran_here(out: Path) -> bool:
    """Returns whether all sessions of a sweep ran on this machine, according to its manifest."""
    if not paths.is_file(out / manifest.NAME):
        return False
    told = manifest.read(out)
    here = {"cpu": cpu_name(), "cores": cpu_cores()}
    return all(one.get("machine") == here for one in [told, *told.get("earlier", [])])
