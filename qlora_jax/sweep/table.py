"""The table of a sweep's rows, for analyses."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_jax.runtime.errors import RunFailed
from qlora_jax.sweep.record import DONE, CellRecord


class Table:
    """The rows of finished cells; each row holds the cell's values and the row's figures.

    Attributes:
      rows: rows; each maps a column to its value.
      missing: records of the cells without rows: failed and skipped cells.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], missing: Iterable[CellRecord] = ()
    ) -> None:
        self.rows = list(rows)
        self.missing = list(missing)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **values: Any) -> "Table":
        """Returns the rows that have these values."""
        return Table(
            row for row in self.rows if all(row.get(k) == value for k, value in values.items())
        )

    def column(self, name: str) -> list[Any]:
        """Returns one column, in the order of the rows; None for a row without it.

        Raises:
          RunFailed: no row has the column.
        """
        if not any(name in row for row in self.rows):
            raise RunFailed(f"no row has {name}: run the cells that give it, then analyse again")
        return [row.get(name) for row in self.rows]

    def values(self, name: str) -> list[Any]:
        """Returns the distinct values of a column, in order of appearance."""
        return list({json.dumps(value): value for value in self.column(name)}.values())

    def groups(self, *names: str) -> dict[tuple[Any, ...], "Table"]:
        """Returns the rows grouped by their values in these columns, in order of appearance."""
        found: dict[str, tuple[tuple[Any, ...], list[Mapping[str, Any]]]] = {}
        for row in self.rows:
            key = tuple(row.get(name) for name in names)
            found.setdefault(json.dumps(key), (key, []))[1].append(row)
        return {key: Table(rows) for key, rows in found.values()}

    def paired(
        self, figure: str, axis: str, first: Any, second: Any, by: Sequence[str]
    ) -> tuple[list[float], list[float]]:
        """Returns a figure for two values of an axis, paired by other columns.

        Args:
          figure: column to compare.
          axis: column with the two values.
          first: value of the axis in the first row of a pair.
          second: value of the axis in the second row of a pair.
          by: columns in which both rows of a pair are equal, such as `["seed"]`. The axis and
            these columns together must identify one row.

        Returns:
          The figures of the first rows and of the second rows, two lists of equal length. Rows
          without a partner are left out.

        Raises:
          RunFailed: there is no pair, or several rows have equal values in the axis and `by`.
        """
        sides = []
        for value in (first, second):
            rows: dict[str, float] = {}
            for row in self.where(**{axis: value}).rows:
                key = json.dumps([row.get(name) for name in by])
                if key in rows:
                    raise RunFailed(f"several rows have {axis}={value} and equal {', '.join(by)}")
                if row.get(figure) is not None:
                    rows[key] = row[figure]
            sides.append(rows)
        common = [key for key in sides[0] if key in sides[1]]
        if not common:
            raise RunFailed(f"no {figure} to compare between {axis}={first} and {axis}={second}")
        return [sides[0][key] for key in common], [sides[1][key] for key in common]


def table_of(records: Iterable[CellRecord]) -> Table:
    """Returns the table of a sweep's records."""
    records = list(records)
    rows = [{**r.values, **row} for r in records if r.status == DONE for row in r.rows]
    return Table(rows, [r for r in records if r.status != DONE])


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Returns rows as a markdown table: floats with four significant digits, None as empty text."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_text(row.get(name)) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
