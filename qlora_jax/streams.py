"""stdout and stderr whose reader may go away, as `| head` does."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _Outlet:
    """A text stream that drops what raises one of `errors`, and all that follows."""

    def __init__(self, stream: TextIO, *errors: type[OSError]) -> None:
        self._stream = stream
        self._errors = errors

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except self._errors:
            self._close()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._errors:
            self._close()

    def _close(self) -> None:
        # The stream keeps what it could not write and tries again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_closed() -> None:
    """Opens the null device in place of each standard stream that is closed from the start.

    Else the next file that is opened would get the stream's number, and what is printed.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


@contextlib.contextmanager
def outlets() -> Iterator[None]:
    """Inside, a closed stdout or stderr ends nothing: what nobody reads is dropped.

    Of stdout only a reader that went away is forgiven: results that do not fit on a disk are lost.
    """
    open_closed()
    with contextlib.ExitStack() as stack:
        out = _Outlet(sys.stdout, BrokenPipeError)
        err = _Outlet(sys.stderr, OSError)
        stack.enter_context(contextlib.redirect_stdout(cast(TextIO, out)))
        stack.enter_context(contextlib.redirect_stderr(cast(TextIO, err)))
        try:
            yield
        finally:
            out.flush()
            err.flush()
