"""Compiles a run's step for a GPU that is not here, and adds up what it needs there.

The real step is compiled from shapes alone. Nothing runs: the figures are XLA's own buffer
assignment for the described device.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.config import Config
from qlora_jax.gpu.compile import compile_for
from qlora_jax.gpu.described import read_gpu
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan import accounts
from qlora_jax.plan.accounts import Account, Step
from qlora_jax.plan.temporaries import Temporary, temporaries
from qlora_jax.runtime import gpu_memory

GEMMS: Mapping[str, Mapping[str, Any]] = {
    "Triton": {},
    "cuBLAS": {"xla_gpu_enable_triton_gemm": False},
}
"""Who multiplies plain matrices: on a GPU, autotuning chooses. The larger program counts."""

LARGEST = 12
"""Temporaries that are listed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run needs on one GPU, in bytes.

    Attributes:
      gpu: name in `described.GPUS`.
      offload: where moments live: device or host; decided here for `auto`.
      limit: bytes of the GPU that the run may use (`gpu_memory.usable`).
      host: pinned host memory.
      programs: the step's: the gradient by each of `GEMMS`, then updates.
      temporaries: bytes of temporaries of the largest gradient program.
    """

    gpu: str
    offload: str
    limit: int
    host: int
    programs: list[Account]
    temporaries: list[Temporary]

    @property
    def device(self) -> int:
        return max(program.device for program in self.programs)

    @property
    def fits(self) -> bool:
        return self.device <= self.limit


def make(config: Config, decoder: DecoderConfig, gpu: str) -> Plan:
    """Compiles the step for a GPU in this process, which must have `compile.environment`.

    Raises:
      UserError: unknown GPU, missing packages, or settings that do not go together.
    """
    hardware = read_gpu(gpu)
    step = accounts.abstract_step(config, decoder, hardware)
    gradients = [gradient(step, gpu, gemm) for gemm in GEMMS]
    worst = max(gradients, key=lambda made: made[0].device)

    def compiled(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
        return compile_for(gpu, function, *arguments, donate=donate)

    updates = accounts.update_accounts(step, compiled)
    limit = gpu_memory.usable(hardware.memory)
    offload, programs = accounts.settle(
        step, config.optimizer.offload, [account for account, _ in gradients], updates, limit
    )
    host = accounts.held_moments(step, offload == "host", False)[1] + worst[0].host
    return Plan(gpu, offload, limit, host, programs, worst[1])


def gradient(step: Step, gpu: str, gemm: str) -> tuple[Account, list[Temporary]]:
    """Compiles the gradient program with one of `GEMMS`; moments on the device are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, **GEMMS[gemm]}

        def compiled(function: Any, *arguments: Any) -> Any:
            return compile_for(gpu, function, *arguments, options=options)

        account = accounts.gradient_account(step, compiled)
        return account._replace(name=gemm), temporaries(Path(folder), LARGEST)
