"""Runs a training run with the memory settings that its plan has chosen."""

from collections.abc import Callable

import jax

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan.fit import GIB, Fit, fit
from qlora_jax.train.initial_values import resolved
from qlora_jax.train.offload import PLACEMENTS, Memory
from qlora_jax.train.report import RunSummary
from qlora_jax.train.run import train


def train_placed(
    config: Config,
    *,
    say: Callable[[str], None],
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
) -> RunSummary:
    """Fine-tunes a model; plans the run first, and keeps arrays on the host if they do not fit.

    Args:
      config: config of the run.
      say: function that is called with lines for the user.
      command: shell command that reproduces the run, for the report and the manifest.
      resume: True continues the run in the output directory.
      overwrite: True deletes the run in the output directory first.
      force: True runs even if the memory of the device is too small.

    Returns:
      Figures of the run.

    Raises:
      UserError: the config, the data or the model cannot be used, or the run does not fit.
      RunFailed: as `train.run.train`.
      Stopped: as `train.run.train`.
    """
    config = resolved(config)
    planned: list[Fit] = []

    def place(decoder: DecoderConfig) -> Memory:
        found = fit(config, decoder, jax.local_devices()[0], force)
        planned.append(found)
        if found.chosen:
            say(f"to fit on the device: {found.chosen}")
        return Memory(PLACEMENTS[found.offload], found.remat)

    summary = train(
        config, say=say, command=command, resume=resume, overwrite=overwrite, place=place
    )
    # A run that was already finished is not planned again.
    bytes_ = planned[0].device if planned else None
    if bytes_ is not None and summary.peak_device_bytes is not None:
        say(
            f"device memory: planned {bytes_ / GIB:.2f} GiB, measured peak "
            f"{summary.peak_device_bytes / GIB:.2f} GiB"
        )
    return summary
