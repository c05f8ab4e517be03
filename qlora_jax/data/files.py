"""Reads the rows of data files (.jsonl, .json, .csv, .parquet, ...), each with its place."""

import csv
import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.data.bad_records import BadRecords
from qlora_jax.data.values import short
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError, first_line

Rows = Iterator[tuple[dict[str, Any], str]]
TEXT = ".txt"
PACKED = ".gz"
MOST = 2**31
"""Maximum number of bytes of a .gz file's unpacked content."""


def ending(path: Path) -> str:
    """Returns the file name's ending, in lower case; an empty string for an unknown format.

    The ending decides how the file is read. A text format may be packed: the ending of
    `a.jsonl.gz` is .jsonl.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [PACKED]:
        found = suffixes[-2] if len(suffixes) > 1 else ""
        return "" if found == PARQUET else known(found)
    return known(suffixes[-1]) if suffixes else ""


def known(suffix: str) -> str:
    """Returns the ending if files with it can be read; else an empty string."""
    return suffix if suffix in READERS or suffix == TEXT else ""


def read_rows(path: Path, bad: BadRecords | None = None) -> Rows:
    """Yields (row, place) of a data file; the place is `file:line` if the format has lines.

    Args:
      path: path of the data file.
      bad: skips and counts rows that cannot be read; None: the first such row raises.

    Raises:
      UserError: the file is missing, of an unknown format, or malformed; the message names the
        line.
    """
    if not paths.exists(path):
        raise UserError(f"{path}: no such file; correct the path")
    read = READERS.get(ending(path))
    if read is None:
        raise UserError(
            f"{path}: a data file ends in {', '.join([*READERS, TEXT])}, or in one of these and "
            f"{PACKED}; convert it"
        )
    return read(path, bad or BadRecords("error"))


def read_text(path: Path) -> str:
    """Returns the text of the whole file; a .gz file is unpacked.

    Raises:
      UserError: the file is missing, unreadable or not UTF-8; the message names the line that is
        not UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise _not_utf8(f"{path}:{line}") from None


def read_bytes(path: Path) -> bytes:
    """Returns the bytes of the whole file; a .gz file is unpacked.

    Raises:
      UserError: the file is missing or unreadable, its name ends in .gz but it is not a whole
        gzip file, or its unpacked content is larger than `MOST` bytes.
    """
    try:
        if path.suffix.lower() != PACKED:
            return path.read_bytes()
        with gzip.open(path) as file:
            data = file.read(MOST + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a whole gzip file: {first_line(e)}; pack it again") from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    if len(data) > MOST:
        raise UserError(
            f"{path}: more than {MOST / 2**30:g} GiB when unpacked; unpack it, or split it"
        )
    return data


def _not_utf8(where: str) -> UserError:
    return UserError(f"{where}: not UTF-8 text; convert the file to UTF-8")


def _jsonl(path: Path, bad: BadRecords) -> Rows:
    # Split the bytes at \n, not the text with splitlines: JSON strings may hold U+2028, and a line
    # that is not UTF-8 must be skipped alone.
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(io.BytesIO(data), 1):
        line = line.rstrip()
        if not line:
            continue
        where, row = f"{path}:{number}", None
        with bad.guard(where):
            row = _object(_json(_decoded(line, where), path, number), where)
        if row is not None:
            yield row, where


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise _not_utf8(where) from None


def _json_list(path: Path, bad: BadRecords) -> Rows:
    text = read_text(path)
    tree = _json(text, path, 1)
    if isinstance(tree, Mapping):
        lists = [v for v in tree.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        tree = lists[0] if len(lists) == 1 else tree
    if not isinstance(tree, list):
        raise UserError(f"{path}: must be a list of objects; for one object per line, use .jsonl")
    for number, item in enumerate(tree, 1):
        where, row = f"{path} item {number}", None
        with bad.guard(where):
            row = _object(item, where)
        if row is not None:
            yield row, where


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json_files.parse(text)
    except json.JSONDecodeError as e:
        if ending(path) == ".json" and e.msg == "Extra data":
            raise UserError(f"{path}: several JSON values; rename it to .jsonl") from None
        at = f"{path}:{line + e.lineno - 1}"
        raise UserError(
            f"{at}: not valid JSON: {e.msg.removesuffix(' at')} at column {e.colno}; correct it"
        ) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: must be a JSON object, not {type(value).__name__}; write for example "
            f'{{"text": {short(value)}}}'
        )
    return value


def _csv(path: Path, bad: BadRecords, delimiter: str) -> Rows:
    csv.field_size_limit(1 << 30)
    text = io.StringIO(read_text(path), newline="")
    reader = csv.DictReader(text, strict=True, delimiter=delimiter)
    good = 0
    try:
        header = reader.fieldnames or ()
        if twice := [name for name in header if list(header).count(name) > 1]:
            raise UserError(f"{path}:1: two columns are named {short(twice[0])}; rename one")
        good = reader.line_num
        for row in reader:
            where = f"{path}:{reader.line_num}"
            good = reader.line_num
            with bad.guard(where):
                if None in row or None in row.values():
                    raise UserError(
                        f"{where}: the row does not have the header's {len(header)} "
                        "columns; quote fields that hold the delimiter"
                    )
            if None not in row and None not in row.values():
                yield row, where
    # After this error the start of the next row is unknown, so skipping one record is impossible.
    except csv.Error as e:
        raise UserError(f"{path}:{good + 1}: not valid CSV: {e}; correct it") from None


def _parquet(path: Path, bad: BadRecords) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path} row {number}"
    # Values that Python cannot represent, such as a date in the year 10,000, raise several types.
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as e:
        reason = first_line(e)
        raise UserError(f"{path}: not a readable Parquet file: {reason}; write it again") from None


PARQUET = ".parquet"
READERS: Mapping[str, Callable[[Path, BadRecords], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_list,
    ".csv": functools.partial(_csv, delimiter=","),
    ".tsv": functools.partial(_csv, delimiter="\t"),
    PARQUET: _parquet,
}
