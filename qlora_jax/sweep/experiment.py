"""The declaration of an experiment: question, grid of cells, functions to run and to analyse."""

import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep.table import Table

if TYPE_CHECKING:
    from qlora_jax.sweep.statistics import Interval

SEED = "seed"
"""Name of the axis with the values `Experiment.seeds`."""

Row = Mapping[str, Any]
"""Name of a figure to its value: a number, text, None, or lists and dicts of these."""

Rows = Row | Sequence[Row]
"""Result of a cell: one row, or several rows, for example one per step."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
      id: 12 hex digits, computed only from the experiment's name and version and from `values`.
      values: axis to value, including the seed; `cell[axis]` returns one of them.
    """

    id: str
    values: Mapping[str, Any]

    def __getitem__(self, axis: str) -> Any:
        return self.values[axis]

    def __str__(self) -> str:
        return " ".join(f"{axis}={text(value)}" for axis, value in self.values.items())


class Context(NamedTuple):
    """The objects that a cell gets besides its values.

    Attributes:
      folder: existing folder for the cell's files. If a cell was killed and runs again, its files
        are still there, so a training run can resume.
      progress: function that shows a few words, such as "step 3/10", beside the progress bar.
    """

    folder: Path
    progress: Callable[[str], None]


class Estimate(NamedTuple):
    """The expected time and memory of a cell.

    Attributes:
      seconds: wall-clock seconds.
      memory_bytes: peak memory in bytes, on the GPU if the cell uses one, else of the host.
    """

    seconds: float
    memory_bytes: int


class Input(NamedTuple):
    """A file or folder that cells read and that a command of `qlora-jax` can make.

    Attributes:
      path: path at which cells read it. The path exists only when the input is complete.
      arguments: arguments of the command. If the command was stopped, the same command continues.
      cost: time and resources to make it, in words.
    """

    path: Path
    arguments: tuple[str, ...]
    cost: str

    @property
    def command(self) -> str:
        return shlex.join(["qlora-jax", *self.arguments])

    def __str__(self) -> str:
        return f"{self.path} is not there and is made first: {self.command} ({self.cost})"


@dataclasses.dataclass(frozen=True)
class Population:
    """The functions that run several cells together in one program.

    Attributes:
      run: function from (cells, context) to the rows of each cell, in order; the context is the
        first cell's. An exception in place of a cell's rows fails this cell only. A single cell is
        run by the experiment's `run` instead.
      key: function from a cell to its key. Cells with equal keys may run together; a cell with key
        None runs alone.
      largest: largest number of cells that run together.
    """

    run: Callable[[Sequence[Cell], Context], Sequence[Rows | Exception]]
    key: Callable[[Cell], Hashable]
    largest: int


class Verdict(NamedTuple):
    """The result of an experiment, compared with the paper's claim.

    Attributes:
      ours: our result, in words and numbers.
      interval: confidence interval of the number that decides; None if there is none.
      verdict: `agrees`, `contradicts` or `undecided` (`statistics.within`).
    """

    ours: str
    interval: "Interval | None"
    verdict: str


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The analysis of all rows of an experiment.

    Attributes:
      verdict: verdict about the paper's claim.
      tables: title to table in markdown (`table.markdown`).
      pictures: file name without ending to matplotlib Figure.
    """

    verdict: Verdict
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _never(cell: Cell) -> None:
    return None


def _nothing(cell: Cell) -> Sequence[Input]:
    return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question and the grid of cells that answers it; `EXPERIMENT` in a file experiments/NAME.py.

    Attributes:
      name: name of the experiment's file, without the ending.
      question: question that the experiment answers.
      paper: claim of the paper, with its section, table or figure.
      expected: expected result, and the reason.
      cost: memory and device of the whole grid in words; also the time, if `estimate` gives none.
      axes: axis to its values. The cells are the product of the axes.
      run: function from (cell, context) to the cell's rows. It runs in another process; an
        exception fails the cell.
      analyse: function from the table of all rows to tables, pictures and a verdict.
      more: additional cells outside the product, each a mapping over the same axes; each is run
        with every seed.
      seeds: values of the axis `seed`; empty if nothing is random.
      skip: function from a cell to the reason why it cannot run, such as a rank larger than the
        matrix; None if it can run.
      inputs: function from a cell to the files that it reads and that a command can make. Missing
        files are made before the sweep.
      estimate: function from a cell to its estimated time and memory, None if unknown. Cells with
        equal estimates are of one kind: the measured time of finished cells of a kind is used for
        the other cells of this kind.
      population: functions to run cells together; None runs each cell alone.
      version: version of the experiment; raise it when earlier results are no longer valid.
    """

    name: str
    question: str
    paper: str
    expected: str
    cost: str
    axes: Mapping[str, Sequence[Any]]
    run: Callable[[Cell, Context], Rows]
    analyse: Callable[[Table], Analysis]
    more: Sequence[Mapping[str, Any]] = ()
    seeds: Sequence[int] = (0, 1, 2)
    skip: Callable[[Cell], str | None] = _never
    inputs: Callable[[Cell], Sequence[Input]] = _nothing
    estimate: Callable[[Cell], Estimate | None] | None = None
    population: Population | None = None
    version: int = 1

    def cells(self, seeds: Sequence[int] | None = None) -> list[Cell]:
        """Returns every cell once, in the order of the axes; the seed varies fastest.

        Args:
          seeds: seeds to use instead of the experiment's; None uses the experiment's.

        Raises:
          UserError: JSON cannot represent a value, or a cell has other axes than the experiment.
        """
        seeds = self.seeds if seeds is None else seeds
        product = itertools.product(*self.axes.values())
        points = [dict(zip(self.axes, values)) for values in product] + [dict(p) for p in self.more]
        if odd := next((p for p in points if p.keys() != self.axes.keys()), None):
            raise UserError(
                f"experiment {self.name}: a cell of `more` has the axes {', '.join(odd)}; "
                f"each must give {', '.join(self.axes)}"
            )
        if SEED in self.axes:
            raise UserError(f"experiment {self.name}: no axis can be called seed; give seeds")
        spread = [p | {SEED: s} for p in points for s in seeds] if seeds else points
        return list({cell.id: cell for cell in map(self.cell, spread)}.values())

    def cell(self, values: Mapping[str, Any]) -> Cell:
        """Returns the cell with these values; its id does not depend on their order.

        Raises:
          UserError: JSON cannot represent a value.
        """
        whole = {"experiment": self.name, "version": self.version, "values": dict(values)}
        try:
            canonical = json.dumps(whole, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise UserError(
                f"experiment {self.name}: {dict(values)}: {e}; give values that JSON has"
            ) from None
        return Cell(hashlib.sha256(canonical.encode()).hexdigest()[:12], dict(values))


def text(value: Any) -> str:
    """Returns a value as text, as shown to the user and as written for `--where`."""
    return value if isinstance(value, str) else json.dumps(value)
