"""What lies at a path, for paths that the user gave."""

import os
from collections.abc import Callable
from pathlib import Path

from qlora_jax.runtime.errors import UserError

PACKAGE = Path(__file__).parents[1]
"""The folder of this package."""


def cache_folder() -> Path:
    """`$QLORA_JAX_CACHE`, else `$XDG_CACHE_HOME/qlora_jax`, else `~/.cache/qlora_jax`."""
    if own := os.environ.get("QLORA_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_jax"


def in_package(file: str) -> str:
    """Returns a file of this package as `qlora_jax/...`; an empty string for any other file."""
    path = Path(file)
    if not path.is_relative_to(PACKAGE):
        return ""
    return path.relative_to(PACKAGE.parent).as_posix()


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything.

    Raises:
      UserError: a folder above it may not be searched, or the system refuses such a path.
    """
    return _ask(Path.exists, path)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file; raises as `exists`."""
    return _ask(Path.is_file, path)


def is_dir(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder; raises as `exists`."""
    return _ask(Path.is_dir, path)


def unreadable(path: str | os.PathLike[str], error: OSError) -> UserError:
    """What to tell of a path that the system does not let this process read."""
    if isinstance(error, PermissionError):
        return UserError(
            f"{path}: not readable by this user; change its permissions, or its folder's"
        )
    return UserError(f"{path}: cannot be read: {error.strerror}; correct the path")


def _ask(question: Callable[[Path], bool], path: str | os.PathLike[str]) -> bool:
    try:
        return question(Path(path))
    except OSError as e:
        raise unreadable(path, e) from None
