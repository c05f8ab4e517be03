"""The rows of a sweep, as an analysis takes them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_jax.runtime.errors import RunFailed
from qlora_jax.sweep.record import DONE, CellRecord


class Table:
    """Rows of finished cells: every row has its cell's values and its own figures.

    Attributes:
      rows: column to value, each.
      missing: cells that have none, failed or skipped.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], missing: Iterable[CellRecord] = ()
    ) -> None:
        self.rows = list(rows)
        self.missing = list(missing)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **values: Any) -> "Table":
        """The rows that have these values."""
        return Table(
            row for row in self.rows if all(row.get(k) == value for k, value in values.items())
        )

    def column(self, name: str) -> list[Any]:
        """One column, in the rows' order.

        Raises:
          RunFailed: no row has it.
        """
        if not any(name in row for row in self.rows):
            raise RunFailed(f"no row has {name}: run the cells that give it, then analyse again")
        return [row.get(name) for row in self.rows]

    def values(self, name: str) -> list[Any]:
        """A column's distinct values, in order of appearance."""
        return list({json.dumps(value): value for value in self.column(name)}.values())

    def groups(self, *names: str) -> dict[tuple[Any, ...], "Table"]:
        """The rows apart by the values of these columns, in order of appearance."""
        found: dict[str, tuple[tuple[Any, ...], list[Mapping[str, Any]]]] = {}
        for row in self.rows:
            key = tuple(row.get(name) for name in names)
            found.setdefault(json.dumps(key), (key, []))[1].append(row)
        return {key: Table(rows) for key, rows in found.values()}

    def paired(
        self, figure: str, axis: str, first: Any, second: Any, by: Sequence[str]
    ) -> tuple[list[float], list[float]]:
        """A figure where `axis` is `first` and where it is `second`, matched by other columns.

        Args:
          figure: the column compared.
          axis: the column whose values are set against each other.
          first: value of the axis.
          second: value of the axis.
          by: columns that both sides of a pair have in common, such as `["seed"]`; together with
            the axis they single out a row.

        Returns:
          Two lists of equal length. Rows without a counterpart are left out.

        Raises:
          RunFailed: nothing is left, or the columns do not single out a row.
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


def of(records: Iterable[CellRecord]) -> Table:
    """The table of a sweep's records."""
    records = list(records)
    rows = [{**r.values, **row} for r in records if r.status == DONE for row in r.rows]
    return Table(rows, [r for r in records if r.status != DONE])


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a table in markdown; numbers to four significant digits, nothing for None."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_text(row.get(name)) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
