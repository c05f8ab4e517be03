"""A training run that is placed on the device as the plan says."""

from collections.abc import Callable

import jax

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan.fit import GIB, Fit, fit
from qlora_jax.train.offload import PLACEMENTS, Memory
from qlora_jax.train.report import RunSummary
from qlora_jax.train.run import train
from qlora_jax.train.start import resolved


def train_placed(
    config: Config,
    *,
    say: Callable[[str], None],
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
) -> RunSummary:
    """Fine-tunes, with what the device has no room for kept on the host.

    Args:
      config: of the run.
      say: called with lines for the user.
      command: what reproduces the run, for the report and the manifest.
      resume: go on where the directory's run stopped.
      overwrite: delete the run that the directory holds.
      force: run even where the device's memory is too small.

    Raises:
      UserError: the input is at fault, or the run does not fit.
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
    # a run that was finished before is not planned again
    bytes_ = planned[0].device if planned else None
    if bytes_ is not None and summary.peak_device_bytes is not None:
        say(
            f"device memory: planned {bytes_ / GIB:.2f} GiB, measured peak "
            f"{summary.peak_device_bytes / GIB:.2f} GiB"
        )
    return summary
