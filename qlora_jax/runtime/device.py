"""Describes the devices on which jax runs, and checks for an unused GPU."""

import contextlib
import dataclasses
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax

from qlora_jax.runtime.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of jax's default backend."""

    backend: str
    """Backend: cpu, gpu or tpu."""
    kind: str
    """Name of the hardware, e.g. NVIDIA H100 80GB HBM3; for a CPU its model."""
    count: int

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        cores = f", {cpu_cores()} cores" if self.backend == "cpu" else ""
        return f"{times}{self.kind} ({self.backend}{cores})"


def describe_devices() -> Devices:
    """Returns the kind and number of the devices of jax's default backend.

    Raises:
      UserError: jax cannot start; see `start`.
    """
    start()
    devices = jax.devices()
    backend = jax.default_backend()
    kind = cpu_name() if backend == "cpu" else devices[0].device_kind
    return Devices(backend, kind, len(devices))


def start() -> None:
    """Starts jax's backend.

    Raises:
      UserError: jax can start none of the platforms in `JAX_PLATFORMS`.
    """
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        with _plugin_errors() as errors:
            jax.devices()
    except (AssertionError, RuntimeError) as e:  # AssertionError: no plugin started
        if not asked:
            raise
        raise UserError(
            f"JAX_PLATFORMS is {asked!r}, and jax cannot start that here "
            f"({first_line(errors[-1] if errors else e)}); unset it, or install jax with that "
            "platform"
        ) from e


@contextlib.contextmanager
def _plugin_errors() -> Iterator[list[BaseException]]:
    """Yields a list that collects the errors of jax's plugins.

    jax logs the tracebacks of these errors. The log records are held back, and are only shown at
    the end if jax starts.

    Raises:
      KeyboardInterrupt: a plugin was interrupted; jax itself would log this and continue.
    """
    logger = logging.getLogger("jax._src.xla_bridge")
    errors: list[BaseException] = []
    records: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        if isinstance(error, KeyboardInterrupt):
            raise error
        errors.append(error)
        records.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield errors
    finally:
        logger.removeFilter(hold)
    for record in records:
        logger.handle(record)


def warn_if_gpu_idle() -> str | None:
    """Returns a warning with a remedy if jax runs on the CPU although there is an NVIDIA GPU.

    Raises:
      UserError: jax cannot start; see `start`.
    """
    start()
    if jax.default_backend() != "cpu" or not has_nvidia_gpu():
        return None
    warning = "warning: this machine has an NVIDIA GPU but jax runs on the CPU; "
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return f"{warning}unset JAX_PLATFORMS, which is {platforms!r}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return f"{warning}unset CUDA_VISIBLE_DEVICES, which is {visible!r}"
    return (
        f"{warning}run `make install EXTRA=cuda13`, or without the repository "
        "`pip install 'qlora-jax[cuda13]'` (cuda12 for a driver before 580)"
    )


def has_nvidia_gpu(root: str | Path = "/") -> bool:
    """Returns whether the driver's files under `root`, or nvidia-smi, list a GPU; without jax."""
    root = Path(root)
    if any(root.glob("proc/driver/nvidia/gpus/*")) or any(root.glob("dev/nvidia[0-9]*")):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def cpu_name() -> str:
    """Returns the processor's model, or the best name that the system gives."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def cpu_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
