"""Reads the values of a row, and remembers which fields of it were read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.streams import printable

Row = Mapping[str, Any]


class Fields:
    """A row whose reader is told later which fields it did not ask for.

    Attributes:
      row: the row.
      where: its place, for messages.
    """

    def __init__(self, row: Row, where: str) -> None:
        self.row = row
        self.where = where
        self._read: set[str] = set()

    def holds(self, name: str) -> bool:
        """Whether the field is there and is neither null nor empty."""
        return not is_empty(self.row.get(name))

    def get(self, name: str) -> Any:
        """The value, None where there is none."""
        self._read.add(name)
        return self.row.get(name)

    def text(self, name: str) -> str:
        """The value of a field that must be there, as text.

        Raises:
          UserError: it is absent or no text.
        """
        if name not in self.row:
            raise UserError(f"{self.where}: no {name} in it; it has {listed(self.row)}")
        return text(self.get(name), f"{self.where}: {name}")

    def structure(self, name: str) -> Any:
        """The value, parsed where a list or an object is given as a JSON string."""
        return structure(self.get(name))

    def unread(self) -> list[str]:
        """Names of the fields that hold something and were not read."""
        return [name for name in self.row if name not in self._read and self.holds(name)]


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, or an empty string, list or object."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and not len(value))


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def text(value: Any, where: str) -> str:
    """Returns a value that must be text.

    Raises:
      UserError: it is something else, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, not {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where} has half a surrogate pair at character {e.start}; remove it"
        ) from None
    return value


def structure(value: Any) -> Any:
    """Returns a value; a string that is a JSON list or object is parsed.

    Cells of .csv and many .parquet files hold lists and objects in this form.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json_files.parse(value)
    except json.JSONDecodeError:
        return value


def list_of(what: str, value: Any, where: str) -> Sequence[Any]:
    """Returns a value that must be a list, or a JSON string of one.

    Args:
      what: the kind of its items, for messages.
      value: the value.
      where: file, line and field, for messages.

    Raises:
      UserError: it is something else.
    """
    found = structure(value)
    if not is_list(found):
        raise UserError(
            f"{where} must be a list of {what}, not {short(value)}; rename the field if it is "
            "something else"
        )
    return found


def without_nulls(value: Any) -> Any:
    """Returns a value without the keys whose value is null, at any depth.

    A table has every key in every row and object, so that null there means absent.
    """
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def listed(row: Row) -> str:
    """The names of a row's fields, for messages."""
    return printable(", ".join(map(str, row))) or "nothing"


def short(value: Any) -> str:
    """A value, for messages: at most 40 characters."""
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
