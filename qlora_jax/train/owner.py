"""Who owns a run directory: a lock for as long as a run writes there, and the folder's identity."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.runtime.atomic import storage_error
from qlora_jax.runtime.errors import UserError

LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What some network file systems answer; runs there are not kept apart."""


class Owner:
    """The one run that writes to a directory.

    Attributes:
      folder: the run directory.
    """

    def __init__(self, folder: Path, lock: int):
        """Takes note of which folder and which file it is.

        Args:
          folder: the run directory.
          lock: file descriptor of the file `LOCK` in it.
        """
        self.folder = folder
        self._lock = lock
        self._identity = _identity(os.stat(folder))

    def check(self) -> None:
        """Makes sure that the folder is still the one that was claimed.

        Raises:
          UserError: it was deleted, moved or replaced.
        """
        try:
            same = (_identity(os.stat(self.folder)), _identity(os.stat(self.folder / LOCK))) == (
                self._identity,
                _identity(os.fstat(self._lock)),
            )
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self.folder}: was deleted, moved or replaced while the run was writing there, "
                "so its state cannot be saved; put it back and --resume, or train again"
            )


class Guest(Owner):
    """A process of the same run that owns nothing: the first one has the directory."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check(self) -> None:
        """Does nothing: the owner checks."""


@contextlib.contextmanager
def own(folder: Path) -> Iterator[Owner]:
    """Holds a folder's lock; the kernel releases it too, however the process ends.

    Raises:
      UserError: another run holds it, or the folder cannot be written to.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise storage_error(folder, e) or e from None
    try:
        _take(folder, lock)
        yield Owner(folder, lock)
    finally:
        os.close(lock)


def check_free(folder: Path) -> None:
    """Makes sure that no run holds the folder's lock; changes nothing.

    Raises:
      UserError: one does.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # no run ever took it, or it is for `own` to tell what is wrong
        return
    try:
        _take(folder, lock)
    finally:
        os.close(lock)


def _take(folder: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another run is writing there; wait for it, stop it, or give another "
            "--output"
        ) from None
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
