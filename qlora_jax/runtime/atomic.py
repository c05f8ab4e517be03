"""Files that are either whole or not there.

A process may be killed at any moment and a disk may fill up; the file under its final name is
then the old one or the new one, never a part.
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
    """Yields a temporary path beside `path`; what is written there becomes `path` at the end.

    The temporary name keeps the suffix. When the body raises, `path` is left as it was and the
    temporary file is removed.

    Raises:
      UserError: the disk is full, or the folder missing or not writable; the folder is named.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        if path.is_dir():
            raise UserError(f"{path}: is a folder, but a file is to be written there; move it away")
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
    """Yields a new folder; with what is put into it, it becomes `folder` at the end.

    A folder that is there is replaced, and put back where that fails. Parents are made.

    Raises:
      UserError: the disk is full or not writable; the folder is named.
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
    """Replaces the content of `path` by `text` in UTF-8, as a whole.

    Raises:
      UserError: as `atomic_write`.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def storage_error(folder: str | Path, error: BaseException) -> UserError | None:
    """What the user can do about a failed write into `folder`; None when it is not theirs to fix.

    Knows OSError, and the text by which libraries written in Rust report one.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    remedy = _REMEDIES.get(number) if number is not None else None
    return UserError(f"{folder}: {remedy}") if remedy else None


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
