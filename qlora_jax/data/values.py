"""Reads the values of a row, and records which fields were read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.streams import printable

Row = Mapping[str, Any]


class Fields:
    """A row of a data set that records which of its fields were read.

    Attributes:
      row: values by field name.
      where: place of the row, for messages to the user.
    """

    def __init__(self, row: Row, where: str) -> None:
        self.row = row
        self.where = where
        self._read: set[str] = set()

    def holds(self, name: str) -> bool:
        """Returns whether the field exists and is neither null nor empty."""
        return not is_empty(self.row.get(name))

    def get(self, name: str) -> Any:
        """Returns the value; None if the field does not exist."""
        self._read.add(name)
        return self.row.get(name)

    def text(self, name: str) -> str:
        """Returns the text of a required field.

        Raises:
          UserError: the field is missing or is not text.
        """
        if name not in self.row:
            raise UserError(f"{self.where}: no field {name}; the row has {listed(self.row)}")
        return text(self.get(name), f"{self.where}: {name}")

    def structure(self, name: str) -> Any:
        """Returns the value; a JSON string of a list or an object is parsed."""
        return structure(self.get(name))

    def unread(self) -> list[str]:
        """Returns the names of the fields that have a value and were not read."""
        return [name for name in self.row if name not in self._read and self.holds(name)]


def is_empty(value: Any) -> bool:
    """Returns whether a value is null, or an empty string, list or object."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and not len(value))


def is_list(value: Any) -> bool:
    """Returns whether a value is a list or another sequence, but not a string or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def text(value: Any, where: str) -> str:
    """Returns the value if it is text, else raises.

    Raises:
      UserError: the value is not a string, or cannot be written as UTF-8.
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
    """Returns the value; a string that holds a JSON list or object is parsed.

    Cells of .csv and many .parquet files hold lists and objects in this form.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json_files.parse(value)
    except json.JSONDecodeError:
        return value


def list_of(what: str, value: Any, where: str) -> Sequence[Any]:
    """Returns the value as a list; a JSON string of a list is parsed.

    Args:
      what: name of the items, for messages.
      value: the value to check.
      where: file, line and field, for messages.

    Raises:
      UserError: the value is neither a list nor a JSON string of one.
    """
    found = structure(value)
    if not is_list(found):
        raise UserError(
            f"{where} must be a list of {what}, not {short(value)}; rename the field if it is "
            "something else"
        )
    return found


def without_nulls(value: Any) -> Any:
    """Returns the value without the keys whose value is null, at any depth.

    In a table, every row and object has every key. A null there means that the key is absent.
    """
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def listed(row: Row) -> str:
    """Returns the names of a row's fields, for messages."""
    return printable(", ".join(map(str, row))) or "nothing"


def short(value: Any) -> str:
    """Returns a value as text of at most 40 characters, for messages."""
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
