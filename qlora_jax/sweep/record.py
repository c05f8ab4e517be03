"""The record of a finished cell."""

from collections.abc import Mapping
from typing import Any, NamedTuple

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


class CellRecord(NamedTuple):
    """The record of one cell, a line of results.jsonl.

    Attributes:
      id: id of the cell.
      values: axis to value.
      status: `done`, `failed` or `skipped`.
      error: reason why the cell failed or was skipped; empty if `status` is `done`.
      rows: rows that the cell returned; each maps the name of a figure to its value.
      wall_s: wall-clock seconds of the cell. If cells ran together, their time divided by their
        number.
      versions: versions of Python and of the packages that ran the cell.
    """

    id: str
    values: Mapping[str, Any]
    status: str
    error: str
    rows: list[dict[str, Any]]
    wall_s: float
    versions: Mapping[str, str | None]
