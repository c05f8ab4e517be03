"""Chooses what is kept and where, for settings that are `auto`: the fastest that fits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.plan import compiled_memory
from qlora_jax.plan.compiled_memory import AbstractStep, ProgramMemory

POLICIES = ("dots", "full", "host")
"""What `model.remat: auto` may be, the fastest first."""


class Compiled(NamedTuple):
    """A step with the accounts of its programs, without moments."""

    step: AbstractStep
    gradients: Sequence[ProgramMemory]
    updates: Sequence[ProgramMemory]


class MemoryChoice(NamedTuple):
    """What is kept and where, and what the step then holds.

    Attributes:
      remat, offload: values of the settings.
      programs: accounts of the gradient's programs, then of the updates'.
    """

    remat: str
    offload: str
    programs: list[ProgramMemory]

    @property
    def device(self) -> int:
        return max(program.device for program in self.programs)

    def settings(self, config: Config) -> list[str]:
        """Returns the settings that were chosen because the fastest ones do not fit."""
        found = []
        if config.model.remat == "auto" and self.remat != POLICIES[0]:
            found.append(f"model.remat={self.remat}")
        if config.optimizer.offload == "auto" and self.offload != "device":
            found.append(f"optimizer.offload={self.offload}")
        return found


def choose(config: Config, limit: int, compile_: Callable[[Config], Compiled]) -> MemoryChoice:
    """Compiles a run's step by one policy after another, until it fits; the last one otherwise.

    Args:
      config: the run's settings.
      limit: bytes of the device that the run may use.
      compile_: from settings whose `model.remat` is not auto.
    """
    asked = config.model.remat
    for remat in POLICIES if asked == "auto" else (asked,):
        step, gradients, updates = compile_(configs.changed(config, {"model.remat": remat}))
        offload, programs = compiled_memory.place_moments(
            step, config.optimizer.offload, gradients, updates, limit
        )
        choice = MemoryChoice(remat, offload, programs)
        if choice.device <= limit:
            break
    return choice
