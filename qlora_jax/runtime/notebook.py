"""Output in a notebook, which has no terminal: text that can be replaced."""

import importlib
from typing import Any

from rich.console import Console


def in_notebook() -> bool:
    """Returns whether this process is a notebook's kernel."""
    return Console().is_jupyter


class CellOutput:
    """A plain text in a cell's output, which each call replaces; needs no widgets."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, text: str) -> None:
        data = {"text/plain": text}
        if self._handle is None:
            display = importlib.import_module("IPython.display").display
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
