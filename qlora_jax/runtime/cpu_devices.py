"""Settings for a CPU that jax splits into several devices, to test a mesh without GPUs."""

import os
import re

THREADS = 4
"""Threads in XLA's pool for each device."""

FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def requested_devices() -> int:
    """Returns the number of CPU devices that the environment asks for."""
    flag = FLAG.search(os.environ.get("XLA_FLAGS", ""))
    named = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    return int(flag[1]) if flag else int(named) if named.isdecimal() else 1


def give_threads() -> None:
    """Makes XLA's thread pool large enough for all CPU devices; call before jax starts.

    All devices share one thread pool. A device's program may wait in several collectives at the
    same time, and each wait blocks a thread. If the pool has only one thread per core, the device
    for which the others wait may get no thread, and XLA aborts the process.
    """
    if (devices := requested_devices()) > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS * devices))
