"""The run directory: made, claimed for a new run or opened for one that goes on."""

import dataclasses
import os
import shutil
from pathlib import Path

from qlora_jax import config as configs
from qlora_jax.atomic import atomic_write, storage_error
from qlora_jax.config import Config
from qlora_jax.errors import UserError

CONFIG = "config.yaml"


def check(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Raises what `claim` would, as far as it shows without writing; costs nothing."""
    folder = Path(config.output)
    file = folder / CONFIG
    if file.exists() and not overwrite:
        if not resume:
            raise UserError(
                f"{folder}: holds a run already; add --resume to go on with it, --overwrite to "
                "delete it, or give another --output"
            )
        stored = configs.load(file)
        # The folder is where it is, however it is spelt and wherever it was made.
        here = dataclasses.replace(config, output=stored.output)
        if differences := configs.difference(stored, here):
            raise UserError(
                f"{folder}: was made with another config, so it cannot be resumed; "
                f"{'; '.join(differences)}"
            )
    elif folder.exists() and not file.exists() and not _is_empty(folder):
        raise UserError(f"{folder}: exists and is not a run directory; give another --output")
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"{folder}: {parent} is a file, not a folder; give another --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {parent} is not writable by this user; give another --output")


def _is_empty(folder: Path) -> bool:
    # A run killed while it wrote its config leaves a temporary file, whose name starts with a dot.
    return folder.is_dir() and all(p.name.startswith(".") for p in folder.iterdir())


def claim(config: Config, *, resume: bool, overwrite: bool) -> Path:
    """Makes the run directory and writes its config, or opens that of the run to resume.

    Args:
      config: of the run.
      resume: go on where the directory's run stopped; a directory without a run starts one.
      overwrite: delete the run that the directory holds.

    Raises:
      UserError: the directory holds a run and neither was asked for, holds something else, was
        made with another config, or cannot be written to.
    """
    check(config, resume=resume, overwrite=overwrite)
    folder = Path(config.output)
    file = folder / CONFIG
    if file.exists() and not overwrite:
        return folder
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise storage_error(folder, e) or e from None
    with atomic_write(file) as temporary:
        configs.dump(config, temporary)
    return folder


def open_run(folder: str | Path) -> Config:
    """The config of a finished or stopped run.

    Raises:
      UserError: not a run directory.
    """
    if not (Path(folder) / CONFIG).is_file():
        raise UserError(f"{folder}: not a run directory (no {CONFIG} in it)")
    return configs.load(Path(folder) / CONFIG)
