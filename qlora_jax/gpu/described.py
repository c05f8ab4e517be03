"""Reads descriptions of GPUs, which need not be in this machine.

In `targets/`, the descriptions of a100 and h100 are XLA's own; those of t4, a6000, rtx4090 and b200
follow NVIDIA's data sheets.
"""

import dataclasses
import functools
import re
from pathlib import Path

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

TARGETS = Path(__file__).parent / "targets"
SUFFIX = ".txtpb"
GPUS = tuple(sorted(path.stem for path in TARGETS.glob(f"*{SUFFIX}")))
TARGET_FILE = "a target file is XLA's GpuTargetConfigProto as text, like those in gpu/targets"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A described GPU.

    Attributes:
      name: NVIDIA's name.
      capability: compute capability, (8, 0) for sm_80.
      cores: number of streaming multiprocessors.
      memory: size of the device memory in bytes.
      shared: largest shared memory of a block, in bytes.
      shared_per_core: shared memory of one multiprocessor, in bytes.
      registers_per_core: number of 32-bit registers of one multiprocessor.
      threads_per_core: largest number of threads on one multiprocessor.
      bandwidth: bandwidth of the device memory, bytes per second.
      l2: size of the level 2 cache in bytes.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    shared: int
    shared_per_core: int
    registers_per_core: int
    threads_per_core: int
    bandwidth: int
    l2: int

    @property
    def device_kind(self) -> str:
        return self.name

    @property
    def compute_capability(self) -> str:
        return ".".join(map(str, self.capability))


def description(gpu: str) -> str:
    """Returns XLA's target description of a GPU.

    Args:
      gpu: a name in `GPUS`, or a file of XLA's `GpuTargetConfigProto` as text, NAME.txtpb.

    Raises:
      UserError: `gpu` is neither, or the file cannot be read.
    """
    own = gpu.endswith(SUFFIX)
    if not own and gpu not in GPUS:
        raise UserError(
            f"GPU {gpu!r} is not known; known: {', '.join(GPUS)}, or a target file *{SUFFIX}"
        )
    path = Path(gpu) if own else TARGETS / f"{gpu}{SUFFIX}"
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{gpu}: no such file") from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except UnicodeDecodeError:
        raise UserError(f"{gpu}: not text; {TARGET_FILE}") from None


@functools.cache
def read_gpu(gpu: str) -> Gpu:
    """Returns the limits and rates in the description of a GPU.

    Raises:
      UserError: there is no description, or it lacks a figure.
    """
    text = description(gpu)

    def field(pattern: str, key: str) -> str:
        match = re.search(rf"\b{key}: {pattern}", text)
        if match is None:
            raise UserError(f"{gpu}: has no {key}; {TARGET_FILE}")
        return match[1]

    def number(key: str) -> int:
        return int(field(r"(\d+)", key))

    return Gpu(
        name=field(r'"([^"]+)"', "name"),
        capability=(number("major"), number("minor")),
        cores=number("core_count"),
        memory=number("device_memory_size"),
        shared=number("shared_memory_per_block_optin"),
        shared_per_core=number("shared_memory_per_core"),
        registers_per_core=number("registers_per_core_limit"),
        threads_per_core=number("threads_per_core_limit"),
        bandwidth=number("memory_bandwidth"),
        l2=number("l2_cache_size"),
    )
