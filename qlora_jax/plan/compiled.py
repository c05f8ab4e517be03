"""Compiles a run's step for a GPU that this machine does not have, and adds up its memory.

The step of real training is compiled from shapes. Nothing runs: the figures are XLA's own buffer
assignment for the described device.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.gpu.compile import compile_for, mesh_for
from qlora_jax.gpu.described import read_gpu
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan import compiled_memory
from qlora_jax.plan.choose import Compiled, choose
from qlora_jax.plan.compiled_memory import AbstractStep, ProgramMemory
from qlora_jax.plan.temporaries import Temporary, temporaries
from qlora_jax.plan.traffic import Times, Traffic, times, traffic
from qlora_jax.runtime import gpu_memory

GEMMS: Mapping[str, Mapping[str, Any]] = {
    "Triton": {},
    "cuBLAS": {"xla_gpu_enable_triton_gemm": False},
}
"""Library of plain matrix products to its XLA options. On a GPU autotuning chooses the library, so
the larger program of the two counts."""

LARGEST = 12
"""Number of temporaries that are listed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory of one run on a GPU, in bytes; on a mesh, of each of its GPUs.

    Attributes:
      gpu: name in `described.GPUS`.
      offload: memory of the moments, device or host; chosen by the plan if the setting is `auto`.
      remat: remat policy of the layers; chosen by the plan if the setting is `auto`.
      limit: bytes of the GPU that the run may use (`gpu_memory.usable`).
      host: bytes of pinned host memory.
      programs: memory of the step's programs: the gradient's with each of `GEMMS`, then the
        update's.
      temporaries: largest temporaries of the largest gradient program.
      traffic: bytes that a device receives in the largest gradient program; None without a mesh.
      times: modelled seconds of a gradient; None without a mesh, or if the rates of the GPU or of
        its links are not known.
    """

    gpu: str
    offload: str
    remat: str
    limit: int
    host: int
    programs: list[ProgramMemory]
    temporaries: list[Temporary]
    traffic: Traffic | None = None
    times: Times | None = None

    @property
    def device(self) -> int:
        return max(program.device for program in self.programs)

    @property
    def fits(self) -> bool:
        return self.device <= self.limit


class CompiledGradient(NamedTuple):
    """A compiled program of the gradient.

    Attributes:
      memory: memory of the program.
      largest: largest temporaries of the program.
      text: HLO text of the program.
    """

    memory: ProgramMemory
    largest: list[Temporary]
    text: str


def make(config: Config, decoder: DecoderConfig, gpu: str) -> Plan:
    """Compiles a run's step for a GPU in this process, which must have `compile.environment`.

    Args:
      config: config of the run.
      decoder: shapes of the model.
      gpu: name in `described.GPUS`.

    Raises:
      UserError: the GPU is unknown, packages are missing, or settings exclude each other.
    """
    hardware = read_gpu(gpu)
    limit, mesh = gpu_memory.usable(hardware.memory), mesh_of(config, gpu)

    def compiled(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
        return compile_for(gpu, function, *arguments, donate=donate, mesh=mesh)

    found: dict[str, Any] = {}

    def step_of(config: Config) -> Compiled:
        step = compiled_memory.abstract_step(config, decoder, hardware, mesh)
        gradients = [made for gemm in GEMMS for made in gradient(step, gpu, gemm, mesh)]
        found["step"], found["worst"] = step, max(gradients, key=lambda made: made.memory.device)
        updates = compiled_memory.update_memory(step, compiled)
        return Compiled(step, [made.memory for made in gradients], updates)

    choice = choose(config, limit, step_of)
    memory, largest, text = found["worst"]
    away = choice.offload == "host"
    host = compiled_memory.held_moments(found["step"], away, False)[1] + memory.host
    plan = Plan(gpu, choice.offload, choice.remat, limit, host, choice.programs, largest)
    if mesh is None:
        return plan
    sent = traffic(text, found["step"], decoder, config.mesh.fsdp)
    decided = configs.changed(config, {"model.remat": choice.remat})
    took = times(decided, decoder, gpu, sent.total)
    return dataclasses.replace(plan, traffic=sent, times=took)


def mesh_of(config: Config, gpu: str) -> Mesh | None:
    """Returns the mesh of a config, of described GPUs; None for one GPU."""
    asked = config.mesh
    return None if asked.devices == 1 else mesh_for(gpu, asked.data, asked.fsdp)


def gradient(step: AbstractStep, gpu: str, gemm: str, mesh: Mesh | None) -> list[CompiledGradient]:
    """Compiles the gradient's programs with one of `GEMMS`; their memory is without moments.

    Args:
      step: functions and shapes of the step.
      gpu: name in `described.GPUS`.
      gemm: key of `GEMMS`.
      mesh: devices over which the model is split; None is one device.
    """
    made = []
    for part in compiled_memory.list_gradient_programs(step):
        with tempfile.TemporaryDirectory() as folder:
            options = {"xla_dump_to": folder, **GEMMS[gemm]}
            program = compile_for(
                gpu,
                part.function,
                *part.arguments,
                donate=part.donate,
                options=options,
                mesh=mesh,
            )
            memory = compiled_memory.memory_of(part, program)
            named = memory._replace(name=f"{memory.name}, {gemm}")
            text: str = program.as_text()  # type: ignore[assignment]
            made.append(CompiledGradient(named, temporaries(Path(folder), LARGEST), text))
    return made
