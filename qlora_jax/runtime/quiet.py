"""Silences transformers and tokenizers, and converts their errors to UserError."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.runtime.errors import UserError, first_line

PANIC = "PanicException"
"""Error type of tokenizers (Rust) for unexpected input; not a subclass of `Exception`."""
STDOUT = 1
"""File descriptor to which Rust writes."""
_lock = threading.RLock()
"""Lock for redirecting stdout, which all threads share."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the advisory warnings of transformers during its first import."""
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
    """Converts errors of transformers and tokenizers to a UserError that names the file.

    Discards what tokenizers prints to stdout, such as names of unknown settings, because stdout is
    for results.
    """
    with _dropping_stdout():
        try:
            yield
        except UserError:
            raise
        except BaseException as e:  # transformers raises a dozen types, tokenizers PANIC
            if not isinstance(e, Exception) and type(e).__name__ != PANIC:
                raise
            raise UserError(
                f"{path}: the tokenizer cannot be loaded ({first_line(e)}); {remedy}"
            ) from None


@contextlib.contextmanager
def _dropping_stdout() -> Iterator[None]:
    """Discards what libraries write to file descriptor 1 in the `with` block."""
    with _lock:
        kept = os.dup(STDOUT)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), STDOUT)
            yield
        finally:
            os.dup2(kept, STDOUT)
            os.close(kept)
