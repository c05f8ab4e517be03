"""The command `qlora-jax pretrain`."""

import argparse
from collections.abc import Sequence

from qlora_jax.commands import time_notice, train
from qlora_jax.commands.common import config_of
from qlora_jax.runtime.errors import UserError

TEXT = "Train a small model from random values; writes a run directory and a Hugging Face folder."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `pretrain` to its parser; they are the arguments of `train`."""
    train.add_arguments(parser)
    parser.usage = str(parser.usage).replace("qlora-jax train", "qlora-jax pretrain")


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Trains from scratch and shows the result.

    Raises:
      UserError: the config names an existing model.
    """
    from qlora_jax.formats.fresh import NAME, shapes

    config = config_of(options.config, settings)
    if (path := config.model.path) != NAME:
        raise UserError(f"model.path {path}: pretrain trains a new model; set it to {NAME}")
    # with epochs, the number of steps is only known after the data is read
    if config.train.epochs is None:
        train_ = config.train
        rows = train_.step_count * train_.batch_size * train_.gradient_accumulation
        time_notice.tell_expected_time(
            "pretrain",
            parameters=time_notice.parameters(shapes(config.pretrain)),
            tokens=rows * config.data.sequence_length,
        )
    train.run(options, settings, command)
