"""Locks a run directory while a run writes to it, and detects if the folder was replaced."""

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
"""Errors of network file systems without locks; runs there are not protected from each other."""


class Owner:
    """The one run that writes to a directory.

    Attributes:
      folder: the run directory.
    """

    def __init__(self, folder: Path, lock: int):
        """Stores the identity of the folder and of the lock file.

        Args:
          folder: run directory.
          lock: file descriptor of the file `LOCK` in the run directory.
        """
        self.folder = folder
        self._lock = lock
        self._identity = _identity(os.stat(folder))

    def check(self) -> None:
        """Checks that the folder is still the claimed one.

        Raises:
          UserError: the folder was deleted, moved or replaced.
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
    """A process of the same run that does not own the directory; the first process owns it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check(self) -> None:
        """Does nothing, because the owning process checks the folder."""


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[Owner]:
    """Holds the lock of a folder; if the process dies, the kernel releases the lock.

    Raises:
      UserError: another run holds the lock, or the folder cannot be written to.
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
    """Checks that no run holds the lock of a folder; changes nothing.

    Raises:
      UserError: a run holds the lock.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # no lock file yet, or a problem that `claim_folder` will report
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
