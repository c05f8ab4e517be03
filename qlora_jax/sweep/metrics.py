"""What cells measure and tables show of it: figures by name and columns by title, as data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from qlora_jax.sweep.statistics import mean
from qlora_jax.sweep.table import Table

Made = TypeVar("Made")
"""What a cell makes and measures, such as a trained model."""

Column = Callable[[Table], Any]
"""Gives the entry of a line, from the rows that the line stands for."""


def average(figure: str) -> Column:
    """Returns a column of a figure's mean."""
    return lambda rows: mean(rows.column(figure)).mean


def interval(figure: str) -> Column:
    """Returns a column of a figure's mean with its interval, as text."""
    return lambda rows: str(mean(rows.column(figure)))


def first(figure: str) -> Column:
    """Returns a column of a figure that all rows of a line have in common; None where none has."""
    return lambda rows: rows.rows[0].get(figure)


@dataclasses.dataclass(frozen=True)
class Metric(Generic[Made]):
    """A figure: how a cell measures it, and how a table shows it.

    Attributes:
      measure: the figure of what a cell made.
      title: the title of its column; empty for a figure that is kept and not shown.
      show: makes the column from the figure's name.
    """

    measure: Callable[[Made], Any]
    title: str = ""
    show: Callable[[str], Column] = interval


def measured(metrics: Mapping[str, Metric[Made]], made: Made) -> dict[str, Any]:
    """Returns every figure of what a cell made, by name: a row, or a part of one."""
    return {name: metric.measure(made) for name, metric in metrics.items()}


def columns(metrics: Mapping[str, Metric[Any]], leading: Sequence[str] = ()) -> dict[str, Column]:
    """Returns the columns of the metrics that have a title, by title.

    Rows from before a metric was added are left out of its column.

    Args:
      metrics: by name of the figure.
      leading: names whose columns come first.
    """
    found = {}
    for name in dict.fromkeys([*leading, *metrics]):
        if title := metrics[name].title:
            found[title] = _of_those_with(name, metrics[name].show(name))
    return found


def _of_those_with(figure: str, column: Column) -> Column:
    def entry(rows: Table) -> Any:
        own = Table(row for row in rows.rows if figure in row)
        return column(own) if len(own) else None

    return entry


def line(rows: Table, columns: Mapping[str, Column]) -> dict[str, Any]:
    """Returns one line of a table: title to entry."""
    return {title: column(rows) for title, column in columns.items()}


def lines(table: Table, axes: Sequence[str], columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Returns a line for each group of rows that have equal values on some axes, values first."""
    return [
        {**dict(zip(axes, values)), **line(rows, columns)}
        for values, rows in table.groups(*axes).items()
    ]
