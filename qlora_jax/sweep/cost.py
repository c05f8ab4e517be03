"""How much of a sweep is still to run, and how long that takes."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.runtime import manifest, paths
from qlora_jax.runtime.device import cpu_cores, cpu_name
from qlora_jax.runtime.expected import about
from qlora_jax.sweep.experiment import Cell, Estimate, Experiment
from qlora_jax.sweep.record import DONE, CellRecord
from qlora_jax.sweep.results import NAME, read
from qlora_jax.sweep.run import left, unfinished


class Work(NamedTuple):
    """The cells that are asked for, with their records and which are to run.

    Attributes:
      records: by cell, of the whole folder.
      reasons: why cells cannot run, by cell.
      left: the cells that are not finished.
      tasks: the cells that run, in the groups that run together. A group with one unfinished cell
        runs whole, finished cells too.
    """

    records: Mapping[str, CellRecord]
    reasons: Mapping[str, str]
    left: Sequence[Cell]
    tasks: Sequence[Sequence[Cell]]

    @property
    def running(self) -> list[Cell]:
        """The cells that run."""
        return [cell for task in self.tasks for cell in task]


class CellTime(NamedTuple):
    """The time that cells take.

    Attributes:
      seconds: wall clock, at best where several run at a time: they share the cores.
      memory_bytes: at the peak, by the experiment's estimate; 0 where it declares none.
      measured: how many cells are counted by finished cells of their kind.
      declared: how many are counted by the experiment's estimate.
      unknown: how many are counted by neither; the seconds are without them.
    """

    seconds: float
    memory_bytes: int
    measured: int
    declared: int
    unknown: int

    @property
    def source(self) -> str | None:
        """`measured`, `declared`, both, or None: where the seconds come from."""
        used = [name for name in ("measured", "declared") if getattr(self, name)]
        return " and ".join(used) or None


def work(
    experiment: Experiment, cells: Sequence[Cell], out: Path, retry_failed: bool = False
) -> Work:
    """Finds what a sweep over these cells would run; nothing is written.

    Args:
      experiment: the experiment.
      cells: the cells asked for.
      out: folder of the results, which need not be there.
      retry_failed: count failed cells as unfinished.

    Raises:
      UserError: as `results.read`.
    """
    records = read(out, experiment) if paths.is_file(out / NAME) else {}
    reasons = {cell.id: reason for cell in cells if (reason := experiment.skip(cell))}
    able = [cell for cell in cells if cell.id not in reasons]
    waiting = left(able, records, retry_failed)
    return Work(
        records, reasons, waiting, unfinished(able, waiting, records, experiment.population)
    )


def time_of(experiment: Experiment, found: Work, out: Path, jobs: int = 1) -> CellTime:
    """Estimates how long the tasks take.

    A cell takes the mean time of the finished cells of its kind, if any ran in this folder and on
    this machine, else the experiment's own estimate. Cells are of one kind where the experiment's
    estimate is the same; without an estimate all are.

    Args:
      experiment: the experiment.
      found: what is to run.
      out: folder of the results.
      jobs: tasks at a time.
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
    """The time of at least one cell in words, with where it comes from."""
    parts = {
        "finished cells of their kind, measured on this machine": found.measured,
        "the experiment's own estimate, not measured on this machine": found.declared,
    }
    used = {source: number for source, number in parts.items() if number}
    if not used:
        return "time: not known; no such cell is finished here, and the experiment tells none"
    by = " and ".join(
        f"{source} ({number:,} cells)" if len(used) > 1 else source
        for source, number in used.items()
    )
    more = f"; without {found.unknown:,} cells of unknown time" if found.unknown else ""
    memory = f", {found.memory_bytes / 2**30:.1f} GiB" if found.memory_bytes else ""
    best = f" at best, {jobs} at a time" if jobs > 1 else ""
    return f"time: about {about(found.seconds)}{best}{memory}, by {by}{more}"


def whole(experiment: Experiment) -> str:
    """The cost of all its cells in words, by its own estimate and in its own words."""
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
    """Tells whether every session of a sweep's folder ran on this machine, by its manifest."""
    if not paths.is_file(out / manifest.NAME):
        return False
    told = manifest.read(out)
    here = {"cpu": cpu_name(), "cores": cpu_cores()}
    return all(one.get("machine") == here for one in [told, *told.get("earlier", [])])
