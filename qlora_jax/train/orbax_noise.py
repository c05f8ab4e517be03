"""What orbax and tensorstore print of errors that they also raise."""

import functools
import logging
import sys
import traceback
from typing import Any

NAMES = ("orbax", "tensorstore", "ocdbt")
"""An error of theirs has one of these in its text or its traceback; OCDBT is a file format."""


@functools.cache
def silence() -> None:
    """Drops for good what their threads and tasks report, which may come long after the error.

    orbax logs by `absl`, and asyncio what became of its other reads. tensorstore wakes event loops
    that its caller has closed, which Python reports as an error that nobody can catch.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_others)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (_is_closed_loop(error) or _is_theirs(error)):
            report(unraisable)

    sys.unraisablehook = report_others


def _is_others(record: logging.LogRecord) -> bool:
    return not _is_theirs(record.exc_info[1] if record.exc_info else None)


def _is_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_theirs(error: BaseException | None) -> bool:
    """Whether an error is from their code, or about it."""
    text = "".join(traceback.format_exception(error)).lower() if error else ""
    return any(name in text for name in NAMES)
