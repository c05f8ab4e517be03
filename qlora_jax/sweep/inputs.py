"""Finds missing inputs of cells, and runs the commands that make them."""

import subprocess
import sys
from collections.abc import Iterable

from qlora_jax.runtime.errors import RunFailed
from qlora_jax.sweep.experiment import Cell, Experiment, Input


def missing(experiment: Experiment, cells: Iterable[Cell]) -> list[Input]:
    """Returns the inputs of these cells that do not exist, each once."""
    read = dict.fromkeys(one for cell in cells for one in experiment.inputs(cell))
    return [one for one in read if not one.path.exists()]


def make(wanted: Input) -> None:
    """Makes an input with its command, in a new process that frees the device when it ends.

    The output of the command goes to stderr.

    Raises:
      RunFailed: the command failed, or did not make the input.
    """
    done = subprocess.run([sys.executable, "-m", "qlora_jax", *wanted.arguments], stdout=2)
    if done.returncode or not wanted.path.exists():
        raise RunFailed(
            f"{wanted.path} was not made: {wanted.command} ended with exit code {done.returncode}"
        )
