"""What orbax and tensorstore print of errors that they also raise."""

import contextlib
import functools
import gc
import logging
import sys
from collections.abc import Iterator
from typing import Any


@functools.cache
def silence() -> None:
    """Drops for good what their threads report, which may come long after the error.

    orbax logs by `absl`. tensorstore wakes event loops that its caller has closed, which Python
    reports as an error that nobody can catch.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if not _is_closed_loop(unraisable):
            others(unraisable)

    sys.unraisablehook = report


def _is_closed_loop(unraisable: Any) -> bool:
    error = unraisable.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


@contextlib.contextmanager
def unretrieved() -> Iterator[None]:
    """Inside, asyncio does not log the errors of futures that an error left behind."""
    logger = logging.getLogger("asyncio")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception:
        gc.collect()  # it logs when a future is collected
        raise
    finally:
        logger.setLevel(before)
