"""Writes files and folders atomically.

A process may be killed at any moment, and a disk may become full. In both cases the path then
holds the whole old file or the whole new file, never a part.
"""

import contextlib
import errno
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.runtime.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "no space left on this disk; free some, or write to another folder",
    errno.EDQUOT: "the disk quota is used up; free some space, or write to another folder",
    errno.EFBIG: "a file grew past a size limit; raise it (ulimit -f), or write to another folder",
    errno.EACCES: "not writable by this user; change its permissions, or write to another folder",
    errno.EPERM: "not writable by this user; change its permissions, or write to another folder",
    errno.EROFS: "on a read-only file system; write to another folder",
    errno.ENOENT: "no such folder; make it first",
    errno.ENOTDIR: "not a folder; write to another one",
}


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; at the end, this file replaces `path`.

    The temporary name has the same suffix. If the `with` block raises, `path` is unchanged and the
    temporary file is deleted.

    Raises:
      UserError: the disk is full, or the folder is missing or not writable; the message names the
        folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        if path.is_dir():
            raise UserError(f"{path}: is a folder, but a file must be written there; move it away")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as e:
        elsewhere = isinstance(e, OSError) and e.filename not in (None, str(temporary), temporary)
        problem = None if elsewhere else storage_error(path.parent, e)
        if problem is None:
            raise
        raise problem from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new temporary folder; at the end, it becomes `folder` with all its files.

    An existing folder is replaced, and restored if the replacement fails. Missing parent folders
    are created.

    Raises:
      UserError: the disk is full or not writable; the message names the folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            new, old = Path(work, "new"), Path(work, "old")
            new.mkdir()
            yield new
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except BaseException:
                if old.exists():
                    os.replace(old, folder)
                raise
    except Exception as e:
        problem = storage_error(folder.parent, e)
        if problem is None:
            raise
        raise problem from None


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` atomically, in UTF-8.

    Raises:
      UserError: the file cannot be written; see `atomic_write`.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def storage_error(folder: str | Path, error: BaseException) -> UserError | None:
    """Returns the UserError for a failed write to `folder`; None if the user cannot fix it.

    Recognizes OSError, and the text `(os error N)` in errors of libraries written in Rust.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    remedy = _REMEDIES.get(number) if number is not None else None
    return UserError(f"{folder}: {remedy}") if remedy else None


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
