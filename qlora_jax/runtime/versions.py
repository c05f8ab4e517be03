"""Of Python and of the packages that figures depend on."""

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
    """Name to version; None for a package that is not installed. Imports none of them.

    Args:
      more: packages beside `PACKAGES`.
    """
    names = (*PACKAGES, *more)
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def jax() -> tuple[int, int]:
    """Returns the first two numbers of jax's version, without importing it."""
    major, minor = importlib.metadata.version("jax").split(".")[:2]
    return int(major), int(minor)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
