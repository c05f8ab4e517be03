"""A third data set that is always there: the source code of the running Python."""

import ast
import functools
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

from qlora_jax.data.builtin.python_docs import DEFINITIONS, modules
from qlora_jax.data.records import Record, Text
from qlora_jax.runtime.errors import UserError


def records(format: str = "auto", dropped: Counter[str] | None = None) -> list[Record]:
    """One text for each public module of the standard library.

    Documentation strings are left out: they are what `python_docs` consists of, and a text that
    is held out of one source must not be trained on in the other.

    Raises:
      UserError: a format with questions, which source code has none of.
    """
    if format not in ("auto", "text"):
        raise UserError(f"data.format {format}: python-source is plain text; use text or auto")
    return list(_sources())


@functools.cache
def _sources() -> tuple[Text, ...]:
    return tuple(
        Text(text=f"# {module}\n{code}", where=f"python-source {module}")
        for path, module in modules(Path(sysconfig.get_path("stdlib")))
        if (code := undocumented(path.read_bytes().decode("utf-8", "replace"))).strip()
    )


def undocumented(source: str) -> str:
    """The source without its documentation strings; as it is where it is no Python.

    Where one is a whole body, `pass` takes its place; one on the line of its `def` stays.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    lines: list[str | None] = [*source.split("\n")]  # as ast counts them; a form feed ends none
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, *DEFINITIONS)) or ast.get_docstring(node) is None:
            continue
        first = node.body[0]
        start, end = first.lineno - 1, first.end_lineno or first.lineno
        indent = (lines[start] or "")[: first.col_offset]
        if not indent.strip():
            lines[start:end] = [None] * (end - start)
            if len(node.body) == 1:
                lines[start] = f"{indent}pass"
    return "\n".join(line for line in lines if line is not None)
