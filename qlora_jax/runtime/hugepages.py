"""Huge pages for malloc, which glibc grants only to a process that asks at its start."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this process anew, once, with huge pages, where Linux gives them on request.

    XLA:CPU takes fresh memory for each large result, and the kernel's faults on its small pages
    are a sizeable share of a training step. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` declines.
    """
    environment = asking(os.environ)
    if environment is not None and on_request():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def asking(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment that asks for huge pages; None where it says yes or no already."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables:
        return None
    joined = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    return {**environment, "GLIBC_TUNABLES": joined}


def on_request(switch: Path = SWITCH) -> bool:
    """Whether the kernel gives huge pages to those who ask, and this libc can ask (2.35)."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        numbers = tuple(int(part) for part in version.split(".")[:2])
        return name == "glibc" and numbers >= (2, 35) and "[madvise]" in switch.read_text()
    except (AttributeError, OSError, ValueError):
        return False
