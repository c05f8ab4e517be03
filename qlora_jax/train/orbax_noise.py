"""Suppresses messages of orbax and tensorstore about errors that they also raise."""

import functools
import logging
import sys
import traceback
import warnings
from typing import Any

NAMES = ("orbax", "tensorstore", "ocdbt")
"""Each error of orbax or tensorstore has one of these names in its text or traceback; OCDBT is a
file format."""
COROUTINES = r"coroutine '[\w.<>]*(serialize|ocdbt|metadata|async_save|_read_)"
"""Regular expression for the start of Python's warning about an orbax coroutine that never ran."""


@functools.cache
def silence() -> None:
    """Suppresses, until the process ends, the reports of orbax threads and tasks after an error.

    Four kinds of report may come long after the error: orbax's log (`absl`), asyncio's log of other
    failed reads, Python's warning about writes that never began, and Python's report about an event
    loop that orbax closed before tensorstore used it.
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
    """Returns False for a log record about an error or a task of orbax or tensorstore."""
    error = record.exc_info[1] if record.exc_info else None
    return not (_is_theirs(error) or _names_them(record.getMessage()))


def _is_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_theirs(error: BaseException | None) -> bool:
    """Returns whether orbax or tensorstore is in the text or the traceback of an error."""
    return bool(error) and _names_them("".join(traceback.format_exception(error)))


def _names_them(text: str) -> bool:
    return any(name in text.lower() for name in NAMES)
