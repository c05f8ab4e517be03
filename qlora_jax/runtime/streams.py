"""stdout and stderr whose reader may go away, as `| head` does, and text that is safe to show."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from qlora_jax.runtime.errors import UserError

ACTED_UPON = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters, halves of surrogate pairs, and marks that turn the direction of text."""


class _Outlet:
    """A text stream that drops what raises one of `errors`, and all that follows.

    Another OSError becomes a UserError, once.
    """

    def __init__(self, stream: TextIO, *errors: type[OSError]) -> None:
        self._stream = stream
        self._errors = errors

    def write(self, text: str) -> int:
        with self._telling():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._telling():
            self._stream.flush()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except self._errors:
            self._close()
        except OSError as e:
            self._close()
            raise UserError(
                f"the results cannot be written to stdout: {e.strerror}; write them elsewhere"
            ) from e

    def _close(self) -> None:
        # The stream keeps what it could not write and tries again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable(text: str) -> str:
    """Escapes what a terminal would act upon, tabs and line ends excepted.

    Names and texts from elsewhere may hold codes that move the cursor or hide what is printed.
    """
    return ACTED_UPON.sub(lambda found: ascii(found[0])[1:-1], text)


def to_read(text: str) -> str:
    """Returns text for stdout: as it is for a file or a program, `printable` for a terminal."""
    return printable(text) if sys.stdout.isatty() else text


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

    Characters that a stream's encoding lacks are escaped. Of stdout only a reader that went away
    is forgiven: results that do not fit on a disk are lost.
    """
    open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and not what a test puts there
            stream.reconfigure(errors="backslashreplace")
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
