"""Collects what the figures of a report depend on: the device and versions of software."""

import contextlib
import shutil
import subprocess
from typing import Any

import jax

from qlora_jax.kernels.select import usable
from qlora_jax.kernels.target import capability_of
from qlora_jax.runtime.device import describe_devices
from qlora_jax.runtime.manifest import git_state
from qlora_jax.runtime.versions import versions

MEMORY = "memory, bytes"
GPU_PACKAGES = (
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cublas", "nvidia-cublas-cu12"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "torch", "triton", "bitsandbytes", "peft"),
)
"""Packages that affect the figures only on a GPU."""

QUERY = ("driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")


def facts(device: Any) -> dict[str, Any]:
    """Returns the facts that the figures depend on, without paths and the host's name."""
    found: dict[str, Any] = {
        "device": describe_devices().kind,
        "backend": jax.default_backend(),
        "capability": getattr(device, "compute_capability", None),
        MEMORY: (device.memory_stats() or {}).get("bytes_limit"),
        "versions": {name: version for name, version in versions(GPU_PACKAGES).items() if version},
        "commit": git_state(),
        "fused kernels": usable(capability_of(device), "bfloat16"),
    }
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            told = done.stdout.split("\n")[0].split(",")
            found |= dict(zip(QUERY, (part.strip() for part in told)))
    return found
