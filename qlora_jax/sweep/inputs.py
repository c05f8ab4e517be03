"""What cells read and a command can make: which of it is not there, and how it is made."""

import subprocess
import sys
from collections.abc import Iterable

from qlora_jax.runtime.errors import RunFailed
from qlora_jax.sweep.experiment import Cell, Experiment, Input


def missing(experiment: Experiment, cells: Iterable[Cell]) -> list[Input]:
    """Returns what these cells read and is not there, each once."""
    read = dict.fromkeys(one for cell in cells for one in experiment.inputs(cell))
    return [one for one in read if not one.path.exists()]


def make(wanted: Input) -> None:
    """Makes an input, in a process that is given the device and gives it back.

    What the command prints goes to stderr.

    Raises:
      RunFailed: the command failed, or made something else.
    """
    done = subprocess.run([sys.executable, "-m", "qlora_jax", *wanted.arguments], stdout=2)
    if done.returncode or not wanted.path.exists():
        raise RunFailed(
            f"{wanted.path} was not made: {wanted.command} ended with exit code {done.returncode}"
        )
