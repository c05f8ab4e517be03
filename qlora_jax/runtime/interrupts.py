"""Handles SIGINT: it raises KeyboardInterrupt, or ends the process at once.

It ends the process wherever a KeyboardInterrupt would be lost: before a command begins, in imports,
and in callbacks. What is written is safe from that as from any kill.
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
    """From here on SIGINT ends the process, unless it is ignored or somebody else handles it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_where_dropped() -> None:
    """From here on a KeyboardInterrupt that Python drops, as in a callback, ends the process."""
    sys.unraisablehook = _end_or_report


def _end_or_report(unraisable: Any) -> None:
    if unraisable.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def raising() -> Iterator[threading.Event]:
    """Inside, SIGINT raises KeyboardInterrupt; in an import it still does as `end_at_once` says.

    Yields:
      An event that is set once KeyboardInterrupt was raised: libraries may turn that into another
      error. It stays unset where SIGINT is ignored, or handled by who calls this.
    """
    came, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        if previous is _end and _in_import(frame):
            _end()  # modules turn KeyboardInterrupt into ImportError, and print it
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
