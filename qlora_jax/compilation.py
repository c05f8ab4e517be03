"""Where compiled programs are kept, so that the next process need not compile them again."""

import hashlib
import os
import platform
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from qlora_jax.paths import cache_folder

FOLDER = "JAX_COMPILATION_CACHE_DIR"

SETTINGS: Mapping[str, str] = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
}
"""Programs worth keeping, by the seconds they took, and bytes of all, the least used go first."""


def keep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Asks jax, which must not be imported yet, to keep what it compiles in the user's cache.

    A variable that is set already stays as it is: `JAX_COMPILATION_CACHE_DIR` names another
    folder, `JAX_ENABLE_COMPILATION_CACHE=0` declines. A folder that cannot be written is no error.
    """
    if FOLDER in environment:
        return
    environment[FOLDER] = str(cache_folder() / "compiled" / processor())
    for name, value in SETTINGS.items():
        environment.setdefault(name, value)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A name for what this processor can do: a home may be shared, programs are for one kind."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
