"""Sets how XLA compiles, caches compiled programs on disk, and releases compiler memory."""

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
"""jax's cache: minimum compile time (s), and maximum size (bytes; least used programs go first)."""

WIDTH = "--xla_cpu_prefer_vector_width"

OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
)
"""Flags with which XLA:GPU computes while it gathers weights."""

OVERLAPS = (0, 11)
"""First jax version whose XLA overlaps by default, as far as there is memory for it."""

COMPILED = "/jax/core/compile/backend_compile_duration"

WORTH_A_TRIM = 0.5
"""Minimum compile time in seconds for `trim`, which itself takes up to 0.2 s."""


def use_wide_vectors(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes XLA:CPU use 512-bit vectors if the processor has them; call before jax starts.

    XLA's default of 256 bits makes decoding one token a fifth slower. The user's flags take
    precedence: `XLA_FLAGS=--xla_cpu_prefer_vector_width=256` switches this off.
    """
    flags = environment.get("XLA_FLAGS", "")
    if WIDTH not in flags:
        environment["XLA_FLAGS"] = f"{flags} {WIDTH}=512".strip()


def overlap(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes XLA:GPU compute while it gathers weights; call before jax starts.

    Does nothing if this version of jax overlaps by default. The user's flags take precedence:
    `XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false` switches off this flag only.
    """
    if versions.jax() >= OVERLAPS:
        return
    flags = environment.get("XLA_FLAGS", "")
    missing = [flag for flag in OVERLAP if flag.partition("=")[0] not in flags]
    environment["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def enable_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes jax cache compiled programs in the user's cache folder; call before importing jax.

    Variables that are already set are not changed: `JAX_COMPILATION_CACHE_DIR` names another
    folder, `JAX_ENABLE_COMPILATION_CACHE=0` switches the cache off. If the folder is not writable,
    programs are not cached; this is no error.
    """
    if FOLDER in environment:
        return
    environment[FOLDER] = str(cache_folder() / "compiled" / processor())
    for name, value in SETTINGS.items():
        environment.setdefault(name, value)


@functools.cache
def give_memory_back() -> None:
    """Makes each later long compilation return its memory to the system, if glibc is the libc.

    The compiler frees about 200 MB, which malloc would keep in addition to the program's buffers.
    """
    import jax  # not at the top: `enable_cache` must run before jax is imported

    def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED and duration_secs > WORTH_A_TRIM:
            trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def trim() -> None:
    """Returns malloc's free memory to the system, if glibc is the libc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a name for this processor's instruction set.

    A compiled program runs only on one kind of processor, and several machines may share a home.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
