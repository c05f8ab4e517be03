"""What is kept of a cell that ended."""

from collections.abc import Mapping
from typing import Any, NamedTuple

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


class CellRecord(NamedTuple):
    """One line of results.jsonl.

    Attributes:
      id: the cell's.
      values: axis to value.
      status: done, failed or skipped.
      error: why it failed or was skipped; empty where done.
      rows: figure to value, each.
      wall_s: that it took; its share where cells ran together.
      versions: of Python and the packages that computed it.
    """

    id: str
    values: Mapping[str, Any]
    status: str
    error: str
    rows: list[dict[str, Any]]
    wall_s: float
    versions: Mapping[str, str | None]
