"""How XLA compiles, and what compiling leaves: programs, kept for the next process, and memory."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from qlora_jax.runtime import versions
from qlora_jax.runtime.paths import cache_folder

FOLDER = "JAX_COMPILATION_CACHE_DIR"

SETTINGS: Mapping[str, str] = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
}
"""Programs worth keeping, by the seconds they took, and bytes of all, the least used go first."""

WIDTH = "--xla_cpu_prefer_vector_width"

OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
)
"""Has XLA:GPU compute beside a gather."""

OVERLAPS = (0, 11)
"""The version of jax from which on XLA does so by itself, as far as there is memory for it."""

COMPILED = "/jax/core/compile/backend_compile_duration"

WORTH_A_TRIM = 0.5
"""Seconds of compiling; giving memory back takes up to 0.2."""


def widen(environment: MutableMapping[str, str] = os.environ) -> None:
    """Asks XLA:CPU, before its first program, for vectors of 512 bits where the processor has them.

    Its own choice is 256: a token is then decoded a fifth slower. Flags of the user's come first:
    `XLA_FLAGS=--xla_cpu_prefer_vector_width=256` declines.
    """
    flags = environment.get("XLA_FLAGS", "")
    if WIDTH not in flags:
        environment["XLA_FLAGS"] = f"{flags} {WIDTH}=512".strip()


def overlap(environment: MutableMapping[str, str] = os.environ) -> None:
    """Asks XLA:GPU, before jax starts, to compute while weights are gathered, where it needs that.

    Flags of the user's come first: `XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false`
    declines the one and keeps the other.
    """
    if versions.jax() >= OVERLAPS:
        return
    flags = environment.get("XLA_FLAGS", "")
    missing = [flag for flag in OVERLAP if flag.partition("=")[0] not in flags]
    environment["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


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


@functools.cache
def give_memory_back() -> None:
    """From here on, gives the memory of each long compilation back to the system, where glibc can.

    The compiler frees some 200 MB that malloc would keep beside the program's own buffers.
    """
    import jax  # not at the top: `keep` comes before jax

    def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and duration_secs > WORTH_A_TRIM:
            trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def trim() -> None:
    """Gives memory that malloc holds free back to the system, where glibc can."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A name for what this processor can do: a home may be shared, programs are for one kind."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
