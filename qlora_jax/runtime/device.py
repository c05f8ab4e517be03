"""What jax runs on, in words."""

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
    """The devices jax sees: all of one backend."""

    backend: str
    """cpu, gpu or tpu."""
    kind: str
    """The hardware's own name, e.g. NVIDIA H100 80GB HBM3; for a CPU its model."""
    count: int

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        cores = f", {cpu_cores()} cores" if self.backend == "cpu" else ""
        return f"{times}{self.kind} ({self.backend}{cores})"


def describe_devices() -> Devices:
    """Names the devices of jax's default backend.

    Raises:
      UserError: as `start`.
    """
    start()
    devices = jax.devices()
    backend = jax.default_backend()
    kind = cpu_name() if backend == "cpu" else devices[0].device_kind
    return Devices(backend, kind, len(devices))


def start() -> None:
    """Starts jax's backend.

    Raises:
      UserError: there is none of the platforms that the environment asks for.
    """
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        with _plugin_errors() as errors:
            jax.devices()
    except (AssertionError, RuntimeError) as e:  # the first where no plugin started
        if not asked:
            raise
        raise UserError(
            f"JAX_PLATFORMS is {asked!r}, and jax cannot start that here "
            f"({first_line(errors[-1] if errors else e)}); unset it, or install jax with that "
            "platform"
        ) from e


@contextlib.contextmanager
def _plugin_errors() -> Iterator[list[BaseException]]:
    """Yields the errors of jax's plugins, whose tracebacks jax logs: after this, if jax starts.

    Raises:
      KeyboardInterrupt: a plugin was interrupted, of which jax logs the traceback and goes on.
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
    """One line with the remedy when jax runs on the CPU of a machine with an NVIDIA GPU.

    Raises:
      UserError: as `start`.
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
    return f"{warning}run `make install EXTRA=cuda13` (EXTRA=cuda12 for a driver before 580)"


def has_nvidia_gpu(root: str | Path = "/") -> bool:
    """Whether the driver under `root`, or nvidia-smi, lists a GPU; jax is not asked."""
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
    """The processor's model, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def cpu_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
