"""Checks paths that the user gave, and finds the cache folder."""

import os
from collections.abc import Callable
from pathlib import Path

from qlora_jax.runtime.errors import UserError

PACKAGE = Path(__file__).parents[1]
"""Folder of this package."""


def cache_folder() -> Path:
    """Returns `$QLORA_JAX_CACHE`, or `$XDG_CACHE_HOME/qlora_jax`, or `~/.cache/qlora_jax`."""
    if own := os.environ.get("QLORA_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_jax"


def in_package(file: str) -> str:
    """Returns a path in this package as `qlora_jax/...`; an empty string for any other path."""
    path = Path(file)
    if not path.is_relative_to(PACKAGE):
        return ""
    return path.relative_to(PACKAGE.parent).as_posix()


def exists(path: str | os.PathLike[str]) -> bool:
    """Returns whether the path exists.

    Raises:
      UserError: a parent folder may not be searched, or the system refuses the path.
    """
    return _ask(Path.exists, path)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether the path is a file; raises like `exists`."""
    return _ask(Path.is_file, path)


def is_dir(path: str | os.PathLike[str]) -> bool:
    """Returns whether the path is a folder; raises like `exists`."""
    return _ask(Path.is_dir, path)


def unreadable(path: str | os.PathLike[str], error: OSError) -> UserError:
    """Returns the UserError for a path that this process cannot read."""
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
