"""Checks which settings a resumed run changes; imports no jax, so that commands start fast."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

ROUNDING = "later results may differ in the last bits from those of an unchanged run"
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
"""Settings that may change on resume; the value is a warning if the setting changes the results.

The number of steps changes the learning rate of some schedules: `step_count.describe_jump` warns.
"""


def check(folder: Path, stored: Config, asked: Config) -> None:
    """Checks that a run may continue with another config.

    Raises:
      UserError: settings outside `MAY_CHANGE` differ; the message names all of them.
    """
    refused = [line for key, line in _differences(stored, asked).items() if key not in MAY_CHANGE]
    if refused:
        raise UserError(
            f"{folder}: was made with another config, so it cannot be resumed; "
            f"{'; '.join(refused)}; leave these as they were, give another --output, or "
            f"--overwrite to begin again (these may change on resume: {', '.join(MAY_CHANGE)})"
        )


def describe(stored: Config, asked: Config) -> list[str]:
    """Returns lines on the changed settings, for two configs that have passed `check`."""
    found = _differences(stored, asked)
    lines = [f"changed on resume: {'; '.join(found.values())}"] if found else []
    return lines + [
        f"warning: {line}: {note}" for key, line in found.items() if (note := MAY_CHANGE[key])
    ]


def is_same(stored: Config, asked: Config) -> bool:
    """Returns whether two configs agree in all settings except `output`."""
    return not _differences(stored, asked)


def _differences(stored: Config, asked: Config) -> dict[str, str]:
    # the folder may have been moved, or be given by another path
    here = dataclasses.replace(asked, output=stored.output)
    return {line.partition(":")[0]: line for line in configs.difference(stored, here)}


def steps_done(folder: Path) -> int:
    """Returns the step of the newest checkpoint, from the folder names; 0 without checkpoints.

    Raises:
      UserError: the user may not read the folder.
    """
    checkpoints = folder / "checkpoints"
    try:
        names = os.listdir(checkpoints) if paths.is_dir(checkpoints) else []
    except OSError as e:
        raise paths.unreadable(checkpoints, e) from None
    return max((int(name) for name in names if name.isdecimal()), default=0)


def check_steps(folder: Path, steps: int) -> None:
    """Checks that a run to resume has not done more than `steps` steps.

    Raises:
      UserError: the run has done more steps.
    """
    if (done := steps_done(folder)) > steps:
        raise UserError(
            f"{folder}: {done} steps are done, and {steps} were asked for; give "
            f"--train.steps={done} or more, or another --output"
        )
