"""Returns the versions of Python and of the packages that influence results."""

import importlib.metadata
import platform
from collections.abc import Sequence

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "tokenizers",
    "qlora-jax",
)


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Returns the version by package name; None if a package is not installed. Imports no package.

    Args:
      more: names of packages in addition to `PACKAGES`.
    """
    names = (*PACKAGES, *more)
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def jax() -> tuple[int, int]:
    """Returns the first two numbers of jax's version, without importing jax."""
    major, minor = importlib.metadata.version("jax").split(".")[:2]
    return int(major), int(minor)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
