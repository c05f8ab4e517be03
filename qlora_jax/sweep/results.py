"""Reads and writes results.jsonl, which has one line per finished cell; lines are only appended.

A process may be killed at any moment. If the last line is incomplete, it is dropped and its cell
runs again. If a cell has several lines, the last line is valid.
"""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.atomic import atomic_write, storage_error, sync
from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep.experiment import Experiment
from qlora_jax.sweep.record import CellRecord

NAME = "results.jsonl"
PARQUET = "results.parquet"
LOCK = ".lock"
FORMAT = 1
"""Version of the format of a line."""

RESERVED = "id", "status", "error", "wall_s"
"""Columns of the table besides axes and figures; a figure may not have such a name."""

LOCK_SECONDS = 5.0
"""Seconds to wait for the lock: the workers of a killed sweep hold it until they end."""


_RECORD = TypeAdapter(CellRecord)


class Results:
    """The records of a sweep, in a folder locked against other processes; a context manager."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        """Locks the folder and reads its records.

        Raises:
          UserError: another sweep uses the folder, it cannot be written, or its results have
            another format, experiment or version.
        """
        self.path = folder / NAME
        self._head = {
            "format": FORMAT,
            "experiment": experiment.name,
            "version": experiment.version,
        }
        with contextlib.ExitStack() as opened:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.lock = _lock(folder)
                opened.callback(os.close, self.lock)
                self.records, size = _read(self.path, self._head)
                self._file = opened.enter_context(self.path.open("ab", buffering=0))
                if self._file.tell() > size:
                    self._file.truncate(size)
                sync(folder)
            except OSError as e:
                raise storage_error(folder, e) or e from e
            self._opened = opened.pop_all()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(self, record: CellRecord) -> None:
        """Appends a record; the record is on the disk when the method returns.

        Raises:
          UserError: the disk is full; earlier records are kept.
        """
        line = json.dumps(self._head | record._asdict(), allow_nan=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            rest = line
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as e:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            raise storage_error(self.path.parent, e) or e from e
        self.records[record.id] = record


def read(folder: Path, experiment: Experiment) -> dict[str, CellRecord]:
    """Returns the records of a sweep by cell id; the sweep may be running.

    Raises:
      UserError: the folder has no results, or they have another format, experiment or version.
    """
    path = folder / NAME
    if not paths.is_file(path):
        raise UserError(f"{path}: no such file; run the sweep first, or give its --out")
    head = {"format": FORMAT, "experiment": experiment.name, "version": experiment.version}
    try:
        return _read(path, head)[0]
    except OSError as e:
        raise paths.unreadable(path, e) from None


def plain(value: Any) -> Any:
    """Returns a figure as a JSON value.

    Scalars of numpy become Python scalars, and numbers that are not finite become None. Halves of
    surrogate pairs in text are escaped, because UTF-8 cannot represent them.

    Raises:
      TypeError: JSON cannot represent the figure.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return {plain(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} is not a figure; give numbers, text, lists or dicts")


def write_parquet(folder: Path, records: Iterable[CellRecord]) -> None:
    """Writes results.parquet: one line per row of each record, and one per cell without rows.

    The columns are id, status, error, wall_s, the axes and the figures. A column contains JSON text
    if its values have several types, are not scalars, or are integers of more than 64 bits.

    Raises:
      UserError: the folder cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    lines = list(_lines(records))
    names = list(dict.fromkeys(name for line in lines for name in line))
    table = {name: _column([line.get(name) for line in lines]) for name in names}
    with atomic_write(folder / PARQUET) as temporary:
        parquet.write_table(pyarrow.table(table), temporary)


def _lines(records: Iterable[CellRecord]) -> Iterator[dict[str, Any]]:
    for record in records:
        own = {"id": record.id, "status": record.status, "error": record.error}
        for row in record.rows or [{}]:
            yield {**own, "wall_s": record.wall_s, **record.values, **row}


def _column(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    fit = all(-(2**63) <= value < 2**63 for value in values if isinstance(value, int))
    if fit and (kinds <= {int, float} or (len(kinds) == 1 and kinds <= {bool, str})):
        return [float(v) if float in kinds and v is not None else v for v in values]
    return [None if value is None else json.dumps(value) for value in values]


def _read(path: Path, head: Mapping[str, Any]) -> tuple[dict[str, CellRecord], int]:
    """Returns the records by cell id, and the size in bytes of all complete lines of the file."""
    data = path.read_bytes() if path.exists() else b""
    size = data.rfind(b"\n") + 1
    found: dict[str, CellRecord] = {}
    for number, line in enumerate(data[:size].splitlines(), 1):
        try:
            tree = json_files.parse(line)
            json.dumps(tree, ensure_ascii=False).encode()  # fails for halves of surrogate pairs
            theirs = {key: tree[key] for key in head}
            if theirs == head:
                own = {key: value for key, value in tree.items() if key not in head}
                record = _RECORD.validate_python(own, strict=True)
                found[record.id] = record
                continue
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}:{number}: not a result; restore the file, or give another --out"
            ) from None
        for key, ours in head.items():
            if theirs[key] != ours:
                raise UserError(
                    f"{path}: has results of {key} {theirs[key]}, not {key} {ours}; give another "
                    "--out, or move the folder away"
                )
    return found, size


def _lock(folder: Path) -> int:
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise UserError(
                    f"{folder}: another sweep is writing there; wait for it, or give another --out"
                ) from None
            time.sleep(0.05)
