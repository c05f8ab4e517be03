"""Handles SIGINT: the signal raises KeyboardInterrupt or ends the process at once.

The signal ends the process where a KeyboardInterrupt would be lost: before a command begins, in
imports, and in callbacks. This is safe because files are written so that a kill damages none.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn


def _end(*_: object) -> NoReturn:
    os.write(2, b"qlora-jax: interrupted\n")
    os._exit(128 + signal.SIGINT)


def end_at_once() -> None:
    """Makes SIGINT end the process from now on, unless it is ignored or has another handler."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_where_dropped() -> None:
    """Makes a KeyboardInterrupt that Python drops, as in a callback, end the process."""
    sys.unraisablehook = _end_or_report


def _end_or_report(unraisable: Any) -> None:
    if unraisable.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def raising() -> Iterator[threading.Event]:
    """Makes SIGINT raise KeyboardInterrupt in the `with` block.

    During an import, SIGINT still ends the process if `end_at_once` was called.

    Yields:
      An event that is set when KeyboardInterrupt is raised, because libraries may convert the
      exception to another error. The event is never set if SIGINT is ignored or the caller has
      another handler.
    """
    came, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        if previous is _end and _in_import(frame):
            _end()  # modules convert KeyboardInterrupt to ImportError and print it
        came.set()
        raise KeyboardInterrupt

    ours = previous in (_end, signal.default_int_handler)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield came
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, previous)


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False
