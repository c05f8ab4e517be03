"""A built-in data set: the source code of the running Python's standard library."""

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
    """Returns one text for each public module of the standard library.

    Docstrings are removed because they are the data set `python_docs`. A text that is held out
    from one data set must not be in the training set of the other.

    Raises:
      UserError: `format` is not auto or text; source code has no questions.
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
    """Returns the source without its docstrings; a source that cannot be parsed is unchanged.

    If a docstring is the whole body, `pass` replaces it. A docstring on the line of its `def`
    is not removed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    lines: list[str | None] = [*source.split("\n")]  # as ast counts lines: not at a form feed
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
