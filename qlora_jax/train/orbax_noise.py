"""What orbax and tensorstore print of errors that they also raise."""

import functools
import logging
import sys
import traceback
import warnings
from typing import Any

NAMES = ("orbax", "tensorstore", "ocdbt")
"""An error of theirs has one of these in its text or its traceback; OCDBT is a file format."""
COROUTINES = r"coroutine '[\w.<>]*(serialize|ocdbt|metadata|async_save|_read_)"
"""How the warning about one of orbax's coroutines begins that never ran."""


@functools.cache
def silence() -> None:
    """Drops for good what their threads and tasks report, which may come long after the error.

    orbax logs by `absl`, and asyncio what became of its other reads. Python warns of its other
    writes, which never began. tensorstore wakes event loops that its caller has closed, which
    Python reports as an error that nobody can catch.
    """
    warnings.filterwarnings("ignore", COROUTINES, RuntimeWarning)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_others)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (_is_closed_loop(error) or _is_theirs(error)):
            report(unraisable)

    sys.unraisablehook = report_others


def _is_others(record: logging.LogRecord) -> bool:
    """False for an error of theirs, and for a line that shows a task of theirs."""
    error = record.exc_info[1] if record.exc_info else None
    return not (_is_theirs(error) or _names_them(record.getMessage()))


def _is_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_theirs(error: BaseException | None) -> bool:
    """Whether an error is from their code, or about it."""
    return bool(error) and _names_them("".join(traceback.format_exception(error)))


def _names_them(text: str) -> bool:
    return any(name in text.lower() for name in NAMES)
