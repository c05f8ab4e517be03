"""Handles a closed stdout or stderr, as with `| head`, and makes text safe for a terminal."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from qlora_jax.runtime.errors import UserError

ACTED_UPON = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters, surrogates, and marks that change the direction of text."""


class _Outlet:
    """A text stream that discards all output after a write raised one of `errors`.

    Any other OSError raises UserError once; later output is discarded, too.
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
        # The stream keeps unwritten text and writes it again when Python exits; discard it then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable(text: str) -> str:
    """Escapes characters that control a terminal, except tabs and line ends.

    Names and texts from data or models may hold codes that move the cursor or hide output.
    """
    return ACTED_UPON.sub(lambda found: ascii(found[0])[1:-1], text)


def to_read(text: str) -> str:
    """Returns text for stdout: `printable` for a terminal, unchanged for a file or a pipe."""
    return printable(text) if sys.stdout.isatty() else text


def open_closed() -> None:
    """Opens the null device for each standard stream that was closed when the process started.

    Otherwise the next opened file would get the stream's descriptor, and so all printed text.
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
    """Discards output to a closed stdout or stderr in the `with` block, without an error.

    Characters that a stream's encoding lacks are escaped. For stdout only a closed pipe is
    ignored. Other errors, such as a full disk, raise UserError because results would be lost.
    """
    open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may replace the stream
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
