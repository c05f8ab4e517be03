"""What a resumed run may change in its config; imports no jax, which commands start later."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

ROUNDING = "the last bits of what follows may differ from a run that was not changed"
MAY_CHANGE: Mapping[str, str | None] = {
    "train.steps": None,
    "train.epochs": None,
    "train.save_every": None,
    "train.keep": None,
    "train.eval_every": None,
    "train.keep_best": None,
    "train.patience": None,
    "optimizer.offload": None,
    "kernels.implementation": ROUNDING,
    "kernels.materialize": ROUNDING,
    "model.remat": ROUNDING,
    "mesh.data": ROUNDING,
    "mesh.fsdp": ROUNDING,
}
"""Settings that may change on resume, each with a warning where it changes what is computed.

The number of steps changes the learning rate of some schedules: `step_count.describe_jump`.
"""


def check(folder: Path, stored: Config, asked: Config) -> None:
    """Makes sure that a run may go on with another config.

    Raises:
      UserError: a setting differs that may not; names all of those.
    """
    refused = [line for key, line in _differences(stored, asked).items() if key not in MAY_CHANGE]
    if refused:
        raise UserError(
            f"{folder}: was made with another config, so it cannot be resumed; "
            f"{'; '.join(refused)}; leave these as they were, give another --output, or "
            f"--overwrite to begin again (on resume may change: {', '.join(MAY_CHANGE)})"
        )


def describe(stored: Config, asked: Config) -> list[str]:
    """Returns lines on what changes; both configs have passed `check`."""
    found = _differences(stored, asked)
    lines = [f"changed on resume: {'; '.join(found.values())}"] if found else []
    return lines + [
        f"warning: {line}: {note}" for key, line in found.items() if (note := MAY_CHANGE[key])
    ]


def is_same(stored: Config, asked: Config) -> bool:
    """Whether two configs differ in no setting but where the run is."""
    return not _differences(stored, asked)


def _differences(stored: Config, asked: Config) -> dict[str, str]:
    # The folder is where it is, however it is spelt and wherever it was made.
    here = dataclasses.replace(asked, output=stored.output)
    return {line.partition(":")[0]: line for line in configs.difference(stored, here)}


def steps_done(folder: Path) -> int:
    """Returns the step of the newest checkpoint, by the names in the folder; 0 without any.

    Raises:
      UserError: the folder may not be read.
    """
    checkpoints = folder / "checkpoints"
    try:
        names = os.listdir(checkpoints) if paths.is_dir(checkpoints) else []
    except OSError as e:
        raise paths.unreadable(checkpoints, e) from None
    return max((int(name) for name in names if name.isdecimal()), default=0)


def check_steps(folder: Path, steps: int) -> None:
    """Makes sure that a run to be resumed has not gone further than it is to go.

    Raises:
      UserError: it has.
    """
    if (done := steps_done(folder)) > steps:
        raise UserError(
            f"{folder}: {done} steps are done, and {steps} were asked for; give "
            f"--train.steps={done} or more, or another --output"
        )
