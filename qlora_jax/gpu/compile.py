"""Compiles for an NVIDIA GPU that is not here, with XLA's own compiler, by its description.

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


def environment(*more: str) -> dict[str, str]:
    """Returns what a process that compiles for absent GPUs sets before it imports jax.

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
    """Tells whether the compile-only packages are installed."""
    return (
        importlib.util.find_spec("jax_plugins") is not None
        and importlib.util.find_spec(PLUGIN) is not None
    )


@functools.cache
def mesh_for(gpu: str, data: int = 1, fsdp: int = 1) -> Mesh:
    """Returns a mesh of GPUs that are not here, all of one kind and of one machine.

    Args:
      gpu: a name in `GPUS`.
      data, fsdp: devices along the axes of those names.

    Raises:
      UserError: an unknown name, or the compile-only packages are missing.
    """
    text, name = description(gpu), read_gpu(gpu).name
    if not has_plugin():
        raise UserError(
            f"compiling for {gpu} needs packages that are not installed: make gpu-check"
        )
    if (version := importlib.metadata.version(PACKAGE)) != jax.__version__:
        raise UserError(
            f"{PACKAGE} {version} does not belong to jax {jax.__version__}; install equal "
            "versions: make gpu-check"
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
    """Compiles `function` for a GPU, or for several.

    Args:
      gpu: a name in `GPUS`.
      function: takes arrays, or trees of them.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are read, and on
        a mesh where each lives.
      donate: positions of donated arguments.
      options: of XLA's compiler, beside `FLAGS`.
      mesh: from `mesh_for`, of this GPU; arguments that live nowhere are on all of it. None is one.

    Raises:
      UserError: an unknown name, or the compile-only packages are missing.
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
    """Compiles what `lower_for` made with these options; see `compile_for`."""
    chosen = dict(options or {})
    try:
        return lowered.compile(chosen or None)
    except jax.errors.JaxRuntimeError as e:
        if UNTUNED not in str(e):
            raise
    return lowered.compile(chosen | WITHOUT_TRITON_GEMM)


@contextlib.contextmanager
def _on(mesh: Mesh, capability: tuple[int, int]) -> Iterator[None]:
    # From 0.11 on, Pallas lowers for the GPU of the context, where there is none for that of jax.
    place = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with place, _mosaic_on(capability), compiling_for(capability):
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
