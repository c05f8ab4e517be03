"""Reads multiple-choice questions from files, folders and hub data sets."""

import ast
import csv
import dataclasses
import io
import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data import files, hub
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

LETTERS = string.ascii_uppercase
FIELDS = ("question", "choices", "answer")
MMLU_COLUMNS = 6
"""Number of columns in MMLU's own files, which have no header: question, four choices, letter."""
SPLITS = ("dev", "val", "validation", "test", "train")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question; `answer` is the index of the correct choice, `where` the place in the data."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    where: str = dataclasses.field(default="", compare=False)


def read(source: str, split: str, name: str | None = None) -> list[Question]:
    """Reads the questions of a split.

    Args:
      source: .csv, .jsonl, .json or .parquet file; folder in MMLU's layout, with a subfolder of
        files `SUBJECT_SPLIT.csv` for each split; or hub id. A row has the fields question, choices,
        answer (an index from 0, or a letter) and optionally subject. A .csv without a header has
        MMLU's six columns, and its subject is in the file name. All rows of a file are read.
      split: split of a folder or a hub data set.
      name: configuration of a hub data set.

    Raises:
      UserError: the source has no questions, or a row is not a question; the message names the
        place of the row.
    """
    path = Path(source).expanduser()
    if paths.is_dir(path):
        found = [q for file in _files(path, split) for q in _file(file)]
    elif paths.is_file(path) or path.suffix in files.READERS:
        found = _file(path)
    else:
        found = [parse(row, where) for row, where in hub.read_rows(source, name, split)]
    if not found:
        raise UserError(f"{source}: no questions in it; give a file, folder or data set with some")
    return found


def is_file(source: str) -> bool:
    """Returns whether the source is a single file, and so a single split."""
    path = Path(source).expanduser()
    return paths.is_file(path) or (not paths.is_dir(path) and path.suffix in files.READERS)


def split_of(source: str) -> str:
    """Returns the split at the end of a file name, as in `anatomy_test.csv`; `all` without one."""
    _, _, split = Path(source).stem.rpartition("_")
    return split if split in SPLITS else "all"


def title(source: str) -> str:
    """Returns the data set's name for a metric: from the file, folder, or end of the hub id."""
    path = Path(source).expanduser().absolute()
    return _subject(path) or path.stem if is_file(source) else path.name


def by_subject(questions: Sequence[Question]) -> Mapping[str, list[Question]]:
    """Returns the questions of each subject, in order."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.subject, []).append(question)
    return groups


def parse(row: Mapping[str, Any], where: str, subject: str = "") -> Question:
    """Parses a row into a question.

    Args:
      row: fields question, choices and answer, and optionally subject.
      where: place of the row in the data, for messages.
      subject: subject for a row without the field subject.

    Raises:
      UserError: the row is not a question.
    """
    if missing := [name for name in FIELDS if row.get(name) is None]:
        raise UserError(
            f"{where}: no {missing[0]} in it; a question has {', '.join(FIELDS)} and may have "
            f"subject, this row has {', '.join(map(str, row)) or 'nothing'}; rename its fields"
        )
    choices = _choices(row["choices"], where)
    text = row["question"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: question must be text, not {text!r}")
    return Question(
        text.strip(),
        choices,
        _answer(row["answer"], len(choices), where),
        str(row.get("subject") or subject),
        where,
    )


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):  # a list in a .csv's field
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"{where}: choices must be a list, not {value!r}") from None
    if not isinstance(value, Sequence) or not 2 <= len(value) <= len(LETTERS):
        raise UserError(f"{where}: choices must be a list of 2 to {len(LETTERS)}, not {value!r}")
    if bad := [c for c in value if not isinstance(c, str) or not c.strip()]:
        raise UserError(f"{where}: a choice must be text, not {bad[0]!r}")
    return tuple(c.strip() for c in value)


def _answer(value: Any, count: int, where: str) -> int:
    letter = str(value).strip()
    known = {**{LETTERS[i]: i for i in range(count)}, **{str(i): i for i in range(count)}}
    if isinstance(value, bool) or letter not in known:
        raise UserError(
            f"{where}: answer must be A to {LETTERS[count - 1]} or 0 to {count - 1}, not {value!r}"
        )
    return known[letter]


def _files(folder: Path, split: str) -> list[Path]:
    found = sorted((folder / split).glob(f"*_{split}.csv"))
    if not found:
        raise UserError(
            f"{folder}: no {split}/*_{split}.csv in it; a folder is laid out as MMLU's own, or "
            "give one file"
        )
    return found


def _file(path: Path) -> list[Question]:
    subject = _subject(path)
    if path.suffix == ".csv" and (rows := _without_header(path)) is not None:
        return [parse(row, where, subject) for row, where in rows]
    return [parse(row, where, subject) for row, where in files.read_rows(path)]


def _subject(path: Path) -> str:
    stem, _, split = path.stem.rpartition("_")
    return stem if split in SPLITS else ""


def _without_header(path: Path) -> Iterator[tuple[dict[str, Any], str]] | None:
    """Returns the rows of a .csv in MMLU's format; None if the first row is a header."""
    reader = csv.reader(io.StringIO(files.read_text(path), newline=""))
    first = next(reader, [])
    if not first or "question" in first:
        return None

    def rows() -> Iterator[tuple[dict[str, Any], str]]:
        for row in itertools.chain([first], reader):
            where = f"{path}:{reader.line_num if row is not first else 1}"
            if len(row) != MMLU_COLUMNS:
                raise UserError(
                    f"{where}: {len(row)} columns; without a header a row has the question, four "
                    "choices and the answer's letter; correct it, or add a header"
                )
            yield {"question": row[0], "choices": row[1:5], "answer": row[5]}, where

    return rows()
