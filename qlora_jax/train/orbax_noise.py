"""Drops what orbax and tensorstore print about errors that they also raise."""

import functools
import logging
import sys
import traceback
import warnings
from typing import Any

NAMES = ("orbax", "tensorstore", "ocdbt")
"""An error of theirs has one of these in its text or its traceback; OCDBT is a file format."""
COROUTINES = r"coroutine '[\w.<>]*(serialize|ocdbt|metadata|async_save|_read_)"
"""Matches the start of Python's warning about a coroutine of orbax that never ran."""


@functools.cache
def silence() -> None:
    """Drops, until the process ends, what their threads and tasks report after an error.

    There are four reports, which may come long after the error: orbax's own log (`absl`), asyncio's
    log of reads that failed as well, Python's warning about writes that never began, and Python's
    report of an event loop that tensorstore wakes after orbax closed it.
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
    """Returns False for a record with an error of theirs, or about a task of theirs."""
    error = record.exc_info[1] if record.exc_info else None
    return not (_is_theirs(error) or _names_them(record.getMessage()))


def _is_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_theirs(error: BaseException | None) -> bool:
    """Returns whether an error comes from their code, or names it."""
    return bool(error) and _names_them("".join(traceback.format_exception(error)))


def _names_them(text: str) -> bool:
    return any(name in text.lower() for name in NAMES)
