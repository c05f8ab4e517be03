"""Writes a program's part of a documentation page, between two marks."""

from pathlib import Path
from typing import NamedTuple

from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.errors import UserError


class Marks(NamedTuple):
    """The lines before and after a program's part of a page; the page has each line once."""

    begin: str
    end: str


def replaced(page: str, marks: Marks, text: str) -> str:
    """Returns the page with `text` in place of the text between the marks.

    Raises:
      ValueError: the page does not have each mark once, the end mark after the begin mark.
    """
    head, _, rest = page.partition(marks.begin)
    _, end, tail = rest.partition(marks.end)
    if not end or page.count(marks.begin) != 1 or page.count(marks.end) != 1:
        raise ValueError(f"not one {marks.begin} and after it one {marks.end}")
    return f"{head}{marks.begin}\n\n{text}\n\n{marks.end}{tail}"


def write(path: Path, marks: Marks, text: str) -> None:
    """Writes the part of a page that is between the marks.

    Raises:
      UserError: the page lacks the marks, or cannot be written.
    """
    try:
        page = replaced(path.read_text("utf-8"), marks, text)
    except ValueError:
        raise UserError(
            f"{path}: add the lines {marks.begin} and {marks.end} where the tables belong"
        ) from None
    write_text(path, page)
