"""Compiles for an absent NVIDIA GPU with XLA's own compiler, from the GPU's description.

Needs the packages of `PLUGIN`, which need no GPU and no driver.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.gpu.described import description, read_gpu
from qlora_jax.kernels.target import compiling_for
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.mesh import DATA, FSDP

PLUGIN, PACKAGE = "jax_plugins.xla_cuda13", "jax-cuda13-plugin"
FLAGS = ("--xla_gpu_autotune_level=0",)
"""Flags for XLA that switch off autotuning, which needs a GPU."""

UNTUNED = "does not support a default config"
"""Part of XLA's error in jax 0.11 for some products if autotuning is off: a product that Triton's
GEMM does not support goes to a backend that needs tuning. With a GPU, XLA tunes it."""

WITHOUT_TRITON_GEMM = {"xla_gpu_enable_triton_gemm": False}
"""Options that avoid `UNTUNED`: every product goes to cuBLAS."""

NO_SPILLS = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"
"""Flag that makes a register spill an error; for our kernels only, since XLA's do spill."""

STAND_INS = {"NVIDIA RTX A6000": "NVIDIA A10"}
"""Name that Pallas' table of GPUs lacks, to a name in it with the same compute capability."""


def environment(*more: str) -> dict[str, str]:
    """Returns the environment, set before the import of jax, for compiling for absent GPUs.

    Args:
      more: flags for XLA, such as `NO_SPILLS`.
    """
    flags = filter(None, (os.environ.get("XLA_FLAGS"), *FLAGS, *more))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        # A program from the cache writes no machine code.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # LLVM makes stack traces that nobody reads; resolving their symbols takes most of the time.
        "LLVM_DISABLE_SYMBOLIZATION": "1",
    }


def has_plugin() -> bool:
    """Returns whether the compile-only packages are installed."""
    return (
        importlib.util.find_spec("jax_plugins") is not None
        and importlib.util.find_spec(PLUGIN) is not None
    )


@functools.cache
def mesh_for(gpu: str, data: int = 1, fsdp: int = 1) -> Mesh:
    """Returns a mesh of absent GPUs, all of one kind and in one machine.

    Args:
      gpu: a name in `GPUS`.
      data, fsdp: numbers of devices along the axes with these names.

    Raises:
      UserError: the name is unknown, or the compile-only packages are missing or do not match jax.
    """
    text, name = description(gpu), read_gpu(gpu).name
    if not has_plugin():
        raise UserError(
            f"compiling for {gpu} needs packages that are not installed; run make gpu-check"
        )
    if (version := importlib.metadata.version(PACKAGE)) != jax.__version__:
        raise UserError(
            f"{PACKAGE} {version} does not belong to jax {jax.__version__}; install equal "
            "versions with make gpu-check"
        )
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=text.replace(f'"{name}"', f'"{STAND_INS.get(name, name)}"'),
        topology=f"1x1x{data * fsdp}",
    )
    return Mesh(np.array(topology.devices).reshape(data, fsdp), (DATA, FSDP))


def compile_for(
    gpu: str,
    function: Callable[..., Any],
    *arguments: Any,
    donate: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> jax.stages.Compiled:
    """Compiles `function` for one absent GPU, or for a mesh of them.

    Args:
      gpu: a name in `GPUS`.
      function: function of arrays, or of trees of arrays.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`; only shapes, dtypes and, with a mesh,
        shardings are read.
      donate: positions of donated arguments.
      options: options of XLA's compiler, in addition to `FLAGS`.
      mesh: mesh of this GPU from `mesh_for`; arguments without a sharding are replicated over it.
        None is one GPU.

    Raises:
      UserError: the name is unknown, or the compile-only packages are missing.
    """
    return compile_lowered(lower_for(gpu, function, *arguments, donate=donate, mesh=mesh), options)


def lower_for(
    gpu: str,
    function: Callable[..., Any],
    *arguments: Any,
    donate: tuple[int, ...] = (),
    mesh: Mesh | None = None,
) -> jax.stages.Lowered:
    """Traces `function` for a GPU and lowers it; see `compile_for`."""
    devices = mesh or mesh_for(gpu)
    everywhere = NamedSharding(devices, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        own = None if mesh is None else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own or everywhere)

    with _on(devices, read_gpu(gpu).capability):
        return jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(placed, arguments))


def compile_lowered(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compiles the result of `lower_for` with these options; see `compile_for`."""
    chosen = dict(options or {})
    try:
        return lowered.compile(chosen or None)
    except jax.errors.JaxRuntimeError as e:
        if UNTUNED not in str(e):
            raise
    return lowered.compile(chosen | WITHOUT_TRITON_GEMM)


@contextlib.contextmanager
def _on(mesh: Mesh, capability: tuple[int, int]) -> Iterator[None]:
    # From jax 0.11 on, Pallas lowers for the GPU of the context mesh, or else for jax's own.
    place = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with place, _mosaic_on(capability), compiling_for(capability):
        yield


@contextlib.contextmanager
def _mosaic_on(capability: tuple[int, int]) -> Iterator[None]:
    # Mosaic GPU takes the architecture of jax's own device, or sm_90 if that device is no GPU.
    if jax.__version_info__ < (0, 11):
        yield  # in these versions, Mosaic is not usable below sm_90
        return
    utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    asked = utils._infer_arch
    utils._infer_arch = lambda: capability
    try:
        yield
    finally:
        utils._infer_arch = asked
