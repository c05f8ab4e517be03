"""The run directory: made, claimed for a new run or opened for one that goes on."""

import shutil
from pathlib import Path

from qlora_jax import config as configs
from qlora_jax.atomic import atomic_write, storage_error
from qlora_jax.config import Config
from qlora_jax.errors import UserError

CONFIG = "config.yaml"


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
    folder = Path(config.output)
    file = folder / CONFIG
    if file.exists() and not overwrite:
        if not resume:
            raise UserError(
                f"{folder}: holds a run already; add --resume to go on with it, --overwrite to "
                "delete it, or give another --output"
            )
        if differences := configs.difference(configs.load(file), config):
            raise UserError(
                f"{folder}: was made with another config, so it cannot be resumed; "
                f"{'; '.join(differences)}"
            )
        return folder
    if folder.exists() and not file.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a run directory; give another --output")
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
