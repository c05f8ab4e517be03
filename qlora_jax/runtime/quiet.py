"""Keeps transformers and tokenizers from printing, and tells what they raise."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.runtime.errors import UserError, first_line

PANIC = "PanicException"
"""Raised by tokenizers, which is written in Rust, for input it did not expect. No `Exception`."""
STDOUT = 1
"""The file descriptor, which Rust writes to."""
_lock = threading.RLock()
"""Held while stdout is dropped, since all threads share it."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' advisories while it is first imported."""
    key = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@contextlib.contextmanager
def loading_tokenizer(path: Path, remedy: str) -> Iterator[None]:
    """Inside, what transformers or tokenizers raises becomes a UserError that names the file.

    What tokenizers prints is dropped: names of settings it does not know, amid our results.
    """
    with _dropping_stdout():
        try:
            yield
        except UserError:
            raise
        except BaseException as e:  # transformers raises a dozen types here, tokenizers its own
            if not isinstance(e, Exception) and type(e).__name__ != PANIC:
                raise
            raise UserError(
                f"{path}: the tokenizer cannot be loaded ({first_line(e)}); {remedy}"
            ) from None


@contextlib.contextmanager
def _dropping_stdout() -> Iterator[None]:
    """Inside, what is written to the process's stdout below Python is dropped."""
    with _lock:
        kept = os.dup(STDOUT)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), STDOUT)
            yield
        finally:
            os.dup2(kept, STDOUT)
            os.close(kept)
