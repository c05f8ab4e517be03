"""The number of steps of a run, and what of its schedule follows from that number."""

import dataclasses
from collections.abc import Callable

from qlora_jax.config import Config, OptimizerConfig
from qlora_jax.train.optimizer import schedule


def with_steps(config: Config, count: Callable[[float], int]) -> Config:
    """Returns the config with `train.steps` in place of `train.epochs`.

    Args:
      config: the run's.
      count: gives the steps of a number of epochs.
    """
    train = config.train
    steps = train.step_count if train.epochs is None else count(train.epochs)
    return dataclasses.replace(config, train=dataclasses.replace(train, steps=steps, epochs=None))


def describe_warmup(config: Config) -> str | None:
    """Returns a warning where the warm-up is longer than the run.

    Args:
      config: with the number of steps.
    """
    warmup, steps = config.optimizer.warmup_steps, config.train.step_count
    if warmup < steps:
        return None
    return (
        f"warning: optimizer.warmup_steps {warmup} is not below the {steps} steps of the run, so "
        f"the learning rate never reaches {config.optimizer.learning_rate:g}; give fewer"
    )


def describe_jump(optimizer: OptimizerConfig, taken: int, before: int, after: int) -> str | None:
    """Returns a warning where another number of steps changes the learning rate at once.

    Args:
      optimizer: the settings of the schedule.
      taken: updates before the run goes on.
      before: steps that the run was to have.
      after: steps that it is to have.
    """
    old, new = (float(schedule(optimizer, steps)(taken)) for steps in (before, after))
    if old == new:
        return None
    return (
        f"warning: optimizer.schedule {optimizer.schedule} follows from the number of steps: with "
        f"{after} instead of {before} the learning rate goes on at {new:.3g}, not {old:.3g}; a run "
        f"of {after} steps from the start would have had other rates before"
    )
