"""A CPU that counts as several devices, as tests and rehearsals of a mesh use it."""

import os
import re

THREADS = 4
"""Of XLA's pool for each device."""

FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def asked() -> int:
    """Returns how many devices the environment makes of the CPU."""
    flag = FLAG.search(os.environ.get("XLA_FLAGS", ""))
    named = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    return int(flag[1]) if flag else int(named) if named.isdecimal() else 1


def give_threads() -> None:
    """Has XLA make a pool that is large enough, before jax starts.

    A device's program may wait in several collectives at one time, each in a thread of the pool
    that all devices share. With as many threads as cores, the device that they wait for may find
    none, and XLA aborts the process.
    """
    if (devices := asked()) > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS * devices))
