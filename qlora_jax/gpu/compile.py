"""Compiling for an NVIDIA GPU that is not here: XLA's own compiler, for a described device.

The descriptions in `targets/` are XLA's own for a100 and h100; t4, a6000, rtx4090 and b200 follow
NVIDIA's data sheets. Needs the packages of `PLUGIN`, which need no GPU and no driver.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from qlora_jax.kernels.target import compiling_for
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

TARGETS = Path(__file__).parent / "targets"
SUFFIX = ".txtpb"
GPUS = tuple(sorted(path.stem for path in TARGETS.glob(f"*{SUFFIX}")))
TARGET_FILE = "a target file is XLA's GpuTargetConfigProto as text, like those in gpu/targets"
PLUGIN, PACKAGE = "jax_plugins.xla_cuda13", "jax-cuda13-plugin"
FLAGS = ("--xla_gpu_autotune_level=0",)
"""Autotuning needs a GPU."""

UNTUNED = "does not support a default config"
"""Part of the error of XLA in jax 0.11 for some products where it may not tune: one that Triton's
GEMM does not take goes to a backend that has to be tuned. A GPU has it tuned."""

WITHOUT_TRITON_GEMM = {"xla_gpu_enable_triton_gemm": False}
"""Options that avoid `UNTUNED`: every product goes to cuBLAS."""

NO_SPILLS = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"
"""For our own kernels, in which a spill would go unnoticed; XLA's have some."""

STAND_INS = {"NVIDIA RTX A6000": "NVIDIA A10"}
"""Names that Pallas' table of GPUs lacks, to one in it of the same compute capability."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A described GPU.

    Attributes:
      name: NVIDIA's name.
      capability: compute capability, (8, 0) for sm_80.
      cores: streaming multiprocessors.
      memory: device memory in bytes.
      shared: shared memory that a block may ask for, in bytes.
      shared_per_core: shared memory of one multiprocessor, in bytes.
      registers_per_core: 32-bit registers of one multiprocessor.
      threads_per_core: threads that one multiprocessor holds.
      bandwidth: of the device memory, bytes per second.
      l2: bytes of the level 2 cache.
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


def environment(*more: str) -> dict[str, str]:
    """What a process that compiles for absent GPUs sets before it imports jax.

    Args:
      more: flags for XLA, such as `NO_SPILLS`.
    """
    flags = filter(None, (os.environ.get("XLA_FLAGS"), *FLAGS, *more))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        # what comes from the cache leaves no machine code behind
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # LLVM makes stack traces that nobody reads; naming their functions takes most of the time
        "LLVM_DISABLE_SYMBOLIZATION": "1",
    }


def has_plugin() -> bool:
    """Whether the compile-only packages are installed."""
    return (
        importlib.util.find_spec("jax_plugins") is not None
        and importlib.util.find_spec(PLUGIN) is not None
    )


def description(gpu: str) -> str:
    """XLA's target description of a GPU.

    Args:
      gpu: a name in `GPUS`, or a file of XLA's `GpuTargetConfigProto` as text, NAME.txtpb.

    Raises:
      UserError: neither, or a file that cannot be read.
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
    """The figures of a description that decide what fits.

    Raises:
      UserError: no description, or one that lacks a figure.
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


def compile_for(
    gpu: str,
    function: Callable[..., Any],
    *arguments: Any,
    donate: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """`function` compiled for a GPU.

    Args:
      gpu: a name in `GPUS`.
      function: takes arrays, or trees of them.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are read.
      donate: positions of donated arguments.
      options: of XLA's compiler, beside `FLAGS`.

    Raises:
      UserError: an unknown name, or the compile-only packages are missing.
    """
    return compile_lowered(lower_for(gpu, function, *arguments, donate=donate), options)


def lower_for(
    gpu: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Lowered:
    """Returns `function` traced for a GPU and lowered; see `compile_for`."""
    text = description(gpu)
    if not has_plugin():
        raise UserError(
            f"compiling for {gpu} needs packages that are not installed: make gpu-check"
        )
    if (version := importlib.metadata.version(PACKAGE)) != jax.__version__:
        raise UserError(
            f"{PACKAGE} {version} does not belong to jax {jax.__version__}; install equal "
            "versions: make gpu-check"
        )
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    place = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    with _on(read_gpu(gpu)):
        return jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(placed, arguments))


def compile_lowered(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """Returns what `lower_for` made, compiled with these options; see `compile_for`."""
    chosen = dict(options or {})
    try:
        return lowered.compile(chosen or None)
    except jax.errors.JaxRuntimeError as e:
        if UNTUNED not in str(e):
            raise
    return lowered.compile(chosen | WITHOUT_TRITON_GEMM)


@contextlib.contextmanager
def _on(gpu: Gpu) -> Iterator[None]:
    # From 0.11 on, Pallas lowers for the GPU of the context, where there is none for that of jax.
    device = AbstractDevice(STAND_INS.get(gpu.name, gpu.name), gpu.cores, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    place = jax.sharding.use_abstract_mesh(mesh)
    with place, _mosaic_on(gpu.capability), compiling_for(gpu.capability):
        yield


@contextlib.contextmanager
def _mosaic_on(capability: tuple[int, int]) -> Iterator[None]:
    # Mosaic GPU asks jax's own device for its architecture and takes sm_90 where that is no GPU.
    if jax.__version_info__ < (0, 11):
        yield  # not usable below sm_90
        return
    utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    asked = utils._infer_arch
    utils._infer_arch = lambda: capability
    try:
        yield
    finally:
        utils._infer_arch = asked
