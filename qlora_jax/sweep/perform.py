"""Runs the cells of one task in a worker, and returns their rows."""

import contextlib
import errno
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.runtime.errors import first_line
from qlora_jax.runtime.versions import versions
from qlora_jax.sweep.experiment import Cell, Context, Experiment, Row, Rows
from qlora_jax.sweep.find import load_experiment
from qlora_jax.sweep.record import DONE, FAILED
from qlora_jax.sweep.results import RESERVED, plain

LOG = "log.txt"
"""File in a task's folder: the output of its cells, and the tracebacks of their exceptions."""

DISK_FULL = errno.ENOSPC, errno.EDQUOT


class CellTask(NamedTuple):
    """The cells that one worker runs together.

    Attributes:
      experiment: file of the experiment.
      cells: values of each cell.
      folder: folder of the first cell; the worker makes it.
    """

    experiment: Path
    cells: Sequence[Mapping[str, Any]]
    folder: Path


class CellOutcome(NamedTuple):
    """The outcome of one cell: `done` with rows, or `failed` with an error."""

    status: str
    error: str
    rows: list[dict[str, Any]]


class WorkerReply(NamedTuple):
    """A worker's reply to a task.

    Attributes:
      outcomes: one outcome per cell; empty if the disk was full.
      wall_s: wall-clock seconds of the whole task.
      versions: versions of Python and of the worker's packages.
      disk_full: error message if a full disk ended the task, else empty.
    """

    outcomes: Sequence[CellOutcome]
    wall_s: float
    versions: Mapping[str, str | None]
    disk_full: str = ""


def failed(task: CellTask, error: str, wall_s: float = 0.0) -> WorkerReply:
    """Returns the reply for a task whose worker died: every cell has failed with this error."""
    return WorkerReply([CellOutcome(FAILED, error, [])] * len(task.cells), wall_s, versions())


def perform(task: CellTask, progress: Callable[[str], None] = lambda words: None) -> WorkerReply:
    """Runs a task in this process; never raises: a cell's exception becomes its outcome."""
    began = time.perf_counter()

    def reply(outcomes: Sequence[CellOutcome], disk_full: str = "") -> WorkerReply:
        return WorkerReply(outcomes, time.perf_counter() - began, versions(), disk_full)

    try:
        task.folder.mkdir(parents=True, exist_ok=True)
        with _logged(task.folder / LOG):
            try:
                return reply(_outcomes(task, Context(task.folder, progress)))
            except Exception:
                traceback.print_exc()
                raise
    except Exception as e:
        for error in (e, e.__cause__):
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                return reply([], first_line(e))
        return reply([_failure(e)] * len(task.cells))


def _outcomes(task: CellTask, context: Context) -> list[CellOutcome]:
    experiment = _experiment(task.experiment)
    cells = [experiment.cell(values) for values in task.cells]
    found: Sequence[Rows | Exception]
    if len(cells) == 1:
        found = [experiment.run(cells[0], context)]
    else:
        assert experiment.population is not None
        found = experiment.population.run(cells, context)
        if len(found) != len(cells):
            raise ValueError(f"the population gave {len(found)} results for {len(cells)} cells")
    return [_outcome(cell, one) for cell, one in zip(cells, found)]


_experiment: Callable[[Path], Experiment] = functools.cache(load_experiment)


def _outcome(cell: Cell, found: Rows | Exception) -> CellOutcome:
    try:
        if isinstance(found, Exception):
            raise found
        rows: Sequence[Row] = [found] if isinstance(found, Mapping) else found
        for row in rows:
            if taken := sorted({*RESERVED, *cell.values} & row.keys()):
                raise ValueError(f"a figure cannot be called {taken[0]}: that is a column already")
        return CellOutcome(DONE, "", [plain(row) for row in rows])
    except Exception as e:
        traceback.print_exception(e)
        return _failure(e)


def _failure(error: Exception) -> CellOutcome:
    return CellOutcome(FAILED, plain(f"{type(error).__name__}: {first_line(error)}"), [])


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Redirects stdout and stderr of this process and of its children to a file."""
    with path.open("ab") as log:
        _flush()
        before = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
        finally:
            _flush()
            for number, old in zip((1, 2), before):
                os.dup2(old, number)
                os.close(old)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
