"""Records results as lines of JSON, each written to disk as soon as it is known."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""One line: `part`, `kind`, and the fields that `Recorder`'s method for the kind writes."""

LONGEST = 400
"""Largest number of characters kept of an error's text."""

_FOLDER = re.compile(r"(?<![\w/])(?:~|\.{0,2})/(?:[^\s/:'\"]+/)+")


class Recorder:
    """A writer that appends the results of one part to a file.

    The `name` of a result is unique within its part; `names` of the part's module declares it.
    """

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def begin(self, *names: str) -> None:
        """Records which results come next; these are the missing ones if the process dies."""
        self._write(kind="begin", names=names)

    def figure(self, name: str, unit: str, value: float, **details: Any) -> None:
        """Records a measured number; `details` may hold `field`, the kind of the figure."""
        if not math.isfinite(value):
            self.absent(name, f"the figure is {value}", error=True)
            return
        self._write(kind="figure", name=name, **{"field": name, **details}, unit=unit, value=value)

    def check(self, name: str, right: bool, **details: Any) -> None:
        """Records whether a checked result is right."""
        self._write(kind="check", name=name, right=bool(right), **details)

    def absent(self, name: str, reason: str, error: bool = False) -> None:
        """Records why a declared result is absent; with `error`, its part counts as failed."""
        text = without_folders(reason)[:LONGEST]
        self._write(kind="absent", name=name, reason=text, **({"error": True} if error else {}))

    def fact(self, name: str, value: Any) -> None:
        """Records a fact about the machine or the software."""
        self._write(kind="fact", name=name, value=value)

    def end(self, seconds: float, outcome: str) -> None:
        """Records how the part ended: `ok`, or what went wrong."""
        self._write(kind="end", seconds=seconds, outcome=without_folders(outcome)[:LONGEST])

    def _write(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain({"part": self.part, **line})) + "\n")


def read(paths: Iterable[Path]) -> Iterator[Line]:
    """Yields the lines of several files, without a last line that was cut off."""
    for path in paths:
        for text in path.read_text("utf-8").splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                continue


def names(lines: Iterable[Mapping[str, Any]], part: str) -> set[str]:
    """Returns the names that a part has recorded."""
    return {line["name"] for line in lines if line["part"] == part and "name" in line}


def begun(lines: Iterable[Mapping[str, Any]], part: str) -> list[str]:
    """Returns the names of a part's last `begin` that the part has not recorded."""
    own = [line for line in lines if line["part"] == part]
    tried = [line["names"] for line in own if line["kind"] == "begin"]
    known = names(own, part)
    return [name for name in tried[-1] if name not in known] if tried else []


def without_folders(text: str) -> str:
    """Removes folders from a text, because reports are shared: /home/me/x.py becomes x.py."""
    return _FOLDER.sub("", text)


def _plain(value: Any) -> Any:
    """Converts a value for JSON: NumPy's numbers to Python's, NaN and infinity to text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
