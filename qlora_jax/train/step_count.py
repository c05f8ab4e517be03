"""Computes the number of steps of a run, and warns about its effect on the learning rate."""

import dataclasses
from collections.abc import Callable

from qlora_jax.config import Config, OptimizerConfig
from qlora_jax.train.optimizer import schedule


def with_steps(config: Config, count: Callable[[float], int]) -> Config:
    """Returns the config with `train.steps` in place of `train.epochs`.

    Args:
      config: config of the run.
      count: function from a number of epochs to the number of steps.
    """
    train = config.train
    steps = train.step_count if train.epochs is None else count(train.epochs)
    return dataclasses.replace(config, train=dataclasses.replace(train, steps=steps, epochs=None))


def describe_warmup(config: Config) -> str | None:
    """Returns a warning if the warm-up does not end before the run; else None.

    Args:
      config: config with `train.steps`.
    """
    warmup, steps = config.optimizer.warmup_steps, config.train.step_count
    if warmup < steps:
        return None
    return (
        f"warning: optimizer.warmup_steps {warmup} is not below the {steps} steps of the run, so "
        f"the learning rate never reaches {config.optimizer.learning_rate:g}; give fewer"
    )


def describe_jump(optimizer: OptimizerConfig, taken: int, before: int, after: int) -> str | None:
    """Returns a warning if a new number of steps makes the learning rate jump on resume; else None.

    Args:
      optimizer: settings of the schedule.
      taken: number of updates before the resume.
      before: number of steps in the stored config.
      after: number of steps in the new config.
    """
    old, new = (float(schedule(optimizer, steps)(taken)) for steps in (before, after))
    if old == new:
        return None
    return (
        f"warning: optimizer.schedule {optimizer.schedule} depends on the number of steps: with "
        f"{after} instead of {before} the learning rate continues at {new:.3g}, not {old:.3g}; a "
        f"run of {after} steps from the start would have had other rates before"
    )
