"""Runs the unfinished cells of a sweep and stores a record of each."""

import contextlib
import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.runtime import manifest
from qlora_jax.runtime.device import cpu_cores, cpu_name
from qlora_jax.runtime.display import ProgressLine, duration
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.versions import versions
from qlora_jax.sweep.engines import ENGINES, EngineSettings
from qlora_jax.sweep.experiment import SEED, Cell, Experiment, Population
from qlora_jax.sweep.perform import LOG, CellTask, WorkerReply
from qlora_jax.sweep.record import DONE, FAILED, SKIPPED, CellRecord
from qlora_jax.sweep.results import Results

WORK = "work"
"""Name of the folder that contains one folder per task."""


def sweep(
    path: Path,
    experiment: Experiment,
    cells: Sequence[Cell],
    out: Path,
    *,
    command: str,
    engine: str = "local",
    jobs: int | None = None,
    resources: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
) -> dict[str, CellRecord]:
    """Runs the cells that are not finished.

    Args:
      path: file of the experiment; workers load it.
      experiment: experiment that the file declares.
      cells: chosen cells.
      out: folder of the results. A cell with a record there runs again only with `retry_failed`, or
        with an unfinished cell of its group (`unfinished_groups`).
      command: command line, for the manifest.
      engine: key of `engines.ENGINES`.
      jobs: largest number of tasks at a time; None: the engine chooses.
      resources: resources that the engine requests for each task.
      retry_failed: whether failed cells run again.

    Returns:
      The records of all cells in the folder, by cell id.

    Raises:
      UserError: the folder cannot be used, or its disk is full; records of finished cells are kept.
    """
    began = time.perf_counter()
    with Results(out, experiment) as results:
        manifest.write(
            out, _described(experiment, cells, command), resumed=(out / manifest.NAME).exists()
        )
        record_skipped(experiment, cells, results)
        waiting = unfinished_cells(cells, results.records, retry_failed)
        tasks = [
            CellTask(path, [cell.values for cell in group], out / WORK / group[0].id)
            for group in unfinished_groups(cells, waiting, results.records, experiment.population)
        ]
        with _Display(sum(len(task.cells) for task in tasks)) as display:
            setup = EngineSettings(jobs, resources or {}, results.lock, out, display.words)
            running = ENGINES[engine](tasks, setup)
            with contextlib.closing(running):  # type: ignore[type-var]
                for task, reply in running:
                    for record in _records(experiment, task, reply, out):
                        results.add(record)
                        display.finished(record, task.folder / LOG)
        manifest.finish(out, {"wall_s": time.perf_counter() - began})
        return results.records


def record_skipped(experiment: Experiment, cells: Sequence[Cell], results: Results) -> None:
    """Stores a record with the reason for each cell that cannot run, unless one is stored."""
    for cell in cells:
        before = results.records.get(cell.id)
        reason = experiment.skip(cell)
        if reason and (before is None or (before.status, before.error) != (SKIPPED, reason)):
            results.add(CellRecord(cell.id, cell.values, SKIPPED, reason, [], 0.0, versions()))


def unfinished_cells(
    cells: Sequence[Cell], records: Mapping[str, CellRecord], retry_failed: bool = False
) -> list[Cell]:
    """Returns the cells that are still to run."""
    over = {DONE, SKIPPED} if retry_failed else {DONE, SKIPPED, FAILED}
    return [c for c in cells if c.id not in records or records[c.id].status not in over]


def unfinished_groups(
    cells: Sequence[Cell],
    waiting: Sequence[Cell],
    records: Mapping[str, CellRecord],
    population: Population | None,
) -> list[list[Cell]]:
    """Returns all groups that contain a cell that is still to run.

    A group runs as a whole, because the last digits of a cell's figures depend on the cells that
    run beside it. So a continued sweep has the same groups as a sweep that was never stopped.
    """
    skipped = {id for id, record in records.items() if record.status == SKIPPED}
    wanted = {cell.id for cell in waiting}
    every = groups([cell for cell in cells if cell.id not in skipped], population)
    return [group for group in every if any(cell.id in wanted for cell in group)]


def groups(cells: Sequence[Cell], population: Population | None) -> list[list[Cell]]:
    """Returns the cells in groups that run together; without a population, one cell per group."""
    if population is None:
        return [[cell] for cell in cells]
    by_key: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        key = population.key(cell)
        by_key.setdefault(("alone", cell.id) if key is None else ("key", key), []).append(cell)
    size = population.largest
    return [own[i : i + size] for own in by_key.values() for i in range(0, len(own), size)]


def _records(
    experiment: Experiment, task: CellTask, reply: WorkerReply, out: Path
) -> Iterator[CellRecord]:
    if reply.disk_full:
        raise UserError(
            f"{out}: no space left on this disk ({reply.disk_full}); finished cells are kept: free "
            "some space, then repeat the command to continue"
        )
    share = reply.wall_s / len(task.cells)
    for values, outcome in zip(task.cells, reply.outcomes):
        yield CellRecord(experiment.cell(values).id, values, *outcome, share, reply.versions)


def _described(experiment: Experiment, cells: Sequence[Cell], command: str) -> dict[str, Any]:
    return {
        "started": manifest.now(),
        "finished": None,
        "command": command,
        "experiment": experiment.name,
        "version": experiment.version,
        "cells": len(cells),
        "seeds": sorted({cell.values[SEED] for cell in cells if SEED in cell.values}),
        "versions": versions(),
        "git": manifest.git_state(),
        "machine": {"cpu": cpu_name(), "cores": cpu_cores()},
    }


class _Display:
    """A progress line (cells done, time left) and a line per failed cell; a context manager."""

    def __init__(self, total: int) -> None:
        self._line = ProgressLine("cells", total, 0, None, time.monotonic)
        self._total = total
        self._done = 0
        self._began = time.monotonic()

    def __enter__(self) -> "_Display":
        if self._total:
            self._line.start("")
        return self

    def __exit__(self, *_: object) -> None:
        if self._total:
            self._line.stop()

    def words(self, words: str) -> None:
        """Shows the progress of a cell."""
        self._line.update(self._done, f"{self._eta()}  {words}")

    def finished(self, record: CellRecord, log: Path) -> None:
        """Counts a finished cell; if the cell failed, shows the reason."""
        self._done += 1
        self._line.update(self._done, self._eta())
        if record.status == FAILED:
            values = " ".join(f"{axis}={value}" for axis, value in record.values.items())
            self._line.note(f"failed: {values}: {record.error} ({log})")

    def _eta(self) -> str:
        spent = time.monotonic() - self._began
        ahead = spent / self._done * (self._total - self._done) if self._done else math.nan
        return f"ETA {duration(ahead)}"
