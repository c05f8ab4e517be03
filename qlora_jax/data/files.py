"""Rows of the file formats people keep data sets in, each with the place it came from."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError, first_line

Rows = Iterator[tuple[dict[str, Any], str]]


def read_rows(path: Path) -> Rows:
    """Yields (row, place) of a data file; the place is `file:line` where the format has lines.

    Raises:
      UserError: missing file, unknown kind of file, or a malformed one; the line is named.
    """
    if not paths.exists(path):
        raise UserError(f"{path}: no such file")
    if path.suffix not in READERS:
        raise UserError(f"{path}: a data file ends in {', '.join([*READERS, '.txt'])}; convert it")
    return READERS[path.suffix](path)


def read_text(path: Path) -> str:
    """The whole file as text.

    Raises:
      UserError: missing, unreadable, or not UTF-8; the line is named.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from None


def _jsonl(path: Path) -> Rows:
    # Not splitlines(): JSON strings may hold U+2028, which is no line end here.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield _object(_json(line, path, number), f"{path}:{number}"), f"{path}:{number}"


def _json_list(path: Path) -> Rows:
    text = read_text(path)
    tree = _json(text, path, 1)
    if isinstance(tree, Mapping):
        lists = [v for v in tree.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        tree = lists[0] if len(lists) == 1 else tree
    if not isinstance(tree, list):
        raise UserError(f"{path}: must be a list of objects; one object a line is a .jsonl file")
    for number, item in enumerate(tree, 1):
        yield _object(item, f"{path} item {number}"), f"{path} item {number}"


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json_files.parse(text)
    except json.JSONDecodeError as e:
        if path.suffix == ".json" and e.msg == "Extra data":
            raise UserError(f"{path}: several JSON values; rename it to .jsonl") from None
        at = f"{path}:{line + e.lineno - 1}"
        raise UserError(f"{at}: not valid JSON: {e.msg} at column {e.colno}; correct it") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def _csv(path: Path) -> Rows:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    good = 0
    try:
        header = reader.fieldnames or ()
        good = reader.line_num
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: the row does not have the header's {len(header)} "
                    "columns; quote fields that hold commas"
                )
            good = reader.line_num
            yield row, where
    except csv.Error as e:
        raise UserError(f"{path}:{good + 1}: not valid CSV: {e}; correct it") from None


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path} row {number}"
    # values that Python cannot hold, such as a date in the year 10,000, are errors of many kinds
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as e:
        reason = first_line(e)
        raise UserError(f"{path}: not a readable Parquet file: {reason}") from None


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
