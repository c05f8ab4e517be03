"""Metrics: how a cell measures a figure, and how a table shows this figure as a column."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from qlora_jax.sweep.statistics import mean
from qlora_jax.sweep.table import Table

Made = TypeVar("Made")
"""Type of the object that a cell makes and measures, such as a trained model."""

Column = Callable[[Table], Any]
"""Function that computes one entry of a table, from the rows that its line summarizes."""


def average(figure: str) -> Column:
    """Returns a column with the mean of a figure."""
    return lambda rows: mean(rows.column(figure)).mean


def interval(figure: str) -> Column:
    """Returns a column with the mean of a figure and its confidence interval, as text."""
    return lambda rows: str(mean(rows.column(figure)))


def first(figure: str) -> Column:
    """Returns a column with a figure that all rows of a line share; None if they do not have it."""
    return lambda rows: rows.rows[0].get(figure)


@dataclasses.dataclass(frozen=True)
class Metric(Generic[Made]):
    """A figure with the functions to measure it and to show it in a table.

    Attributes:
      measure: function from the object that a cell made to the figure.
      title: title of the column; empty for a figure that is stored but not shown.
      show: function from the figure's name to its column.
    """

    measure: Callable[[Made], Any]
    title: str = ""
    show: Callable[[str], Column] = interval


def measured(metrics: Mapping[str, Metric[Made]], made: Made) -> dict[str, Any]:
    """Returns all figures of the object that a cell made, by name; a row or a part of a row."""
    return {name: metric.measure(made) for name, metric in metrics.items()}


def columns(metrics: Mapping[str, Metric[Any]], leading: Sequence[str] = ()) -> dict[str, Column]:
    """Returns the columns of all metrics with a title, by title.

    A column leaves out rows without its figure: they were stored before the metric was added.

    Args:
      metrics: name of the figure to metric.
      leading: names of the figures whose columns come first.
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
    """Returns one line per group of rows with equal values on `axes`; these values come first."""
    return [
        {**dict(zip(axes, values)), **line(rows, columns)}
        for values, rows in table.groups(*axes).items()
    ]
