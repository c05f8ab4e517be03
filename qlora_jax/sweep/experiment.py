"""What an experiment declares: its question, its grid, what a cell runs and what the rows mean."""

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
"""The axis that `Experiment.seeds` spans."""

Row = Mapping[str, Any]
"""Figure to value: numbers, text, None, or lists and dicts of them."""

Rows = Row | Sequence[Row]
"""What a cell gives: one row, or several, such as one a step."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
      id: 12 hex digits, a function of the experiment's name and version and of the values alone.
      values: axis to value, the seed among them; also `cell[axis]`.
    """

    id: str
    values: Mapping[str, Any]

    def __getitem__(self, axis: str) -> Any:
        return self.values[axis]

    def __str__(self) -> str:
        return " ".join(f"{axis}={text(value)}" for axis, value in self.values.items())


class Context(NamedTuple):
    """What a cell is given besides its values.

    Attributes:
      folder: for files, there already. A cell that was killed finds what it left there, so a
        training run in it can resume.
      progress: shows a few words, such as "step 3/10", beside the sweep's bar.
    """

    folder: Path
    progress: Callable[[str], None]


class Estimate(NamedTuple):
    """What a cell is expected to take.

    Attributes:
      seconds: wall clock.
      memory_bytes: at the peak, of a GPU's memory or else of the host's.
    """

    seconds: float
    memory_bytes: int


class Input(NamedTuple):
    """A file or folder that cells read and that a command of `qlora-jax` can make.

    Attributes:
      path: where cells look for it; it is there once it is whole.
      arguments: arguments of the command. Run again, the command goes on where it was stopped.
      cost: what making it takes, in words.
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
    """How cells run together, in one program.

    Attributes:
      run: (cells, context) to the rows of each, in order; an exception in a cell's place fails
        that cell alone. The context is the first cell's. A cell left over goes to the
        experiment's own `run`.
      key: cells of equal keys may run together; one of key None runs by itself.
      largest: most cells at a time.
    """

    run: Callable[[Sequence[Cell], Context], Sequence[Rows | Exception]]
    key: Callable[[Cell], Hashable]
    largest: int


class Verdict(NamedTuple):
    """What the measurement says of the paper's claim.

    Attributes:
      ours: the finding, in words and numbers.
      interval: of the number that decides.
      verdict: agrees, contradicts or undecided (`statistics.within`).
    """

    ours: str
    interval: "Interval | None"
    verdict: str


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the rows amount to.

    Attributes:
      verdict: one line.
      tables: title to markdown (`table.markdown`).
      pictures: file stem to matplotlib Figure.
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
    """One question put to a grid of cells; `EXPERIMENT` in a file experiments/NAME.py.

    Attributes:
      name: of its file, without the ending.
      question: that it answers.
      paper: what the paper says, and where.
      expected: what should come out here, and why.
      cost: memory and device of the whole grid in words, and the time where `estimate` tells none.
      axes: axis to values; cells are their product.
      run: (cell, context) to its rows. Runs in another process; raises to fail the cell.
      analyse: the table of all rows to tables, pictures and a verdict.
      more: cells that the product lacks, each a mapping over the same axes; given every seed.
      seeds: values of the axis `seed`; none where nothing is random.
      skip: why a cell cannot run, such as a rank above the matrix; None where it can.
      inputs: files that a cell reads and a command can make. Missing ones are made first.
      estimate: what a cell takes; None where it is not known. Cells of equal estimates are of one
        kind: where some are finished, their measured time counts for the rest.
      population: how cells run together; None runs each by itself.
      version: to raise when results made before no longer count.
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
        """Every cell once, in the order of the axes, seeds innermost.

        Args:
          seeds: in place of the experiment's own.

        Raises:
          UserError: a value that JSON does not have, or cells of differing axes.
        """
        seeds = self.seeds if seeds is None else seeds
        product = itertools.product(*self.axes.values())
        points = [dict(zip(self.axes, values)) for values in product] + [dict(p) for p in self.more]
        if odd := next((p for p in points if p.keys() != self.axes.keys()), None):
            raise UserError(
                f"experiment {self.name}: a cell with {', '.join(odd)}; "
                f"each must give {', '.join(self.axes)}"
            )
        if SEED in self.axes:
            raise UserError(f"experiment {self.name}: seeds are no axis; give them as seeds")
        spread = [p | {SEED: s} for p in points for s in seeds] if seeds else points
        return list({cell.id: cell for cell in map(self.cell, spread)}.values())

    def cell(self, values: Mapping[str, Any]) -> Cell:
        """The cell of these values, whatever their order.

        Raises:
          UserError: a value that JSON does not have.
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
    """A value as it is shown, and given to --where."""
    return value if isinstance(value, str) else json.dumps(value)
