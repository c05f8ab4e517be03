"""Chooses remat and offload for settings that are `auto`: the fastest that fit in memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.plan import compiled_memory
from qlora_jax.plan.compiled_memory import AbstractStep, ProgramMemory

POLICIES = ("dots", "full", "host")
"""Values that `model.remat: auto` may become, the fastest first."""


class Compiled(NamedTuple):
    """A step with the memory of its compiled programs, without moments.

    Attributes:
      step: functions and shapes of the step.
      gradients: memory of the gradient's programs.
      updates: memory of the update's programs.
    """

    step: AbstractStep
    gradients: Sequence[ProgramMemory]
    updates: Sequence[ProgramMemory]


class MemoryChoice(NamedTuple):
    """Chosen settings of memory, and the memory of the step with them.

    Attributes:
      remat, offload: values of `model.remat` and `optimizer.offload`.
      programs: memory of the gradient's programs, then of the update's programs.
    """

    remat: str
    offload: str
    programs: list[ProgramMemory]

    @property
    def device(self) -> int:
        return max(program.device for program in self.programs)

    def settings(self, config: Config) -> list[str]:
        """Returns the chosen values of `auto` settings whose fastest value does not fit."""
        found = []
        if config.model.remat == "auto" and self.remat != POLICIES[0]:
            found.append(f"model.remat={self.remat}")
        if config.optimizer.offload == "auto" and self.offload != "device":
            found.append(f"optimizer.offload={self.offload}")
        return found


def choose(config: Config, limit: int, compile_: Callable[[Config], Compiled]) -> MemoryChoice:
    """Compiles a run's step with one remat policy after another, until the step fits.

    Args:
      config: config of the run.
      limit: device bytes that the run may use.
      compile_: function of a config whose `model.remat` is not auto.

    Returns:
      The first choice that fits; the last one if none fits.
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
