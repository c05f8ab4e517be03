"""Switches on huge pages for malloc; glibc reads this setting only when a process starts."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Restarts this process once with huge pages, if Linux gives them on request.

    XLA:CPU allocates new memory for each large result. With small pages, the page faults take a
    considerable share of a training step. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` switches this
    off.
    """
    environment = environment_with_hugepages(os.environ)
    if environment is not None and on_request():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def environment_with_hugepages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Returns the environment with huge pages on; None if it already has the setting."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables:
        return None
    joined = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    return {**environment, "GLIBC_TUNABLES": joined}


def on_request(switch: Path = SWITCH) -> bool:
    """Returns whether the kernel gives huge pages on request and glibc is 2.35 or newer."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        numbers = tuple(int(part) for part in version.split(".")[:2])
        return name == "glibc" and numbers >= (2, 35) and "[madvise]" in switch.read_text()
    except (AttributeError, OSError, ValueError):
        return False
