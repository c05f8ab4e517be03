"""The run directory: made, claimed for a new run or opened for one that goes on."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.runtime import json_files, paths, processes
from qlora_jax.runtime.atomic import atomic_write, storage_error
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import owner
from qlora_jax.train import resume as resume_of
from qlora_jax.train.owner import LOCK, Guest, Owner

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
FILES = (CONFIG, MANIFEST, "metrics.jsonl", "samples.md", "report.md", "loss_curve.png")
FOLDERS = (CHECKPOINTS, "tensorboard", "adapter", "model")
OWN = (*FILES, *FOLDERS)
"""All that a run writes into its directory beside its lock, which stays."""
TEMPORARY = (
    r"\.(config|manifest|metrics|samples|report|loss_curve)\.[0-9a-f]{8}\.\w+|\.(adapter|model)-\w+"
)
"""What a run that is killed while it writes may leave."""


def holds_run(folder: str | Path) -> bool:
    """Whether a run was begun in the folder.

    Raises:
      UserError: the folder may not be searched.
    """
    folder = Path(folder)
    begun = paths.exists(folder / MANIFEST) or paths.is_dir(folder / CHECKPOINTS)
    return begun and paths.is_file(folder / CONFIG)


def check(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Raises what `claim` would, as far as it shows without writing; costs nothing."""
    folder = Path(config.output)
    _check_links(folder)
    owner.check_free(folder)
    _check_contents(config, folder, resume=resume, overwrite=overwrite)
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if paths.exists(p))
    if not paths.is_dir(parent):
        raise UserError(f"{folder}: {parent} is a file, not a folder; give another --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {parent} is not writable by this user; give another --output")


def _check_contents(config: Config, folder: Path, *, resume: bool, overwrite: bool) -> None:
    if not holds_run(folder):
        if paths.exists(folder) and (stranger := _first_stranger(folder)):
            raise UserError(
                f"{folder}: exists and is not a run directory (it holds {stranger}); "
                "give another --output"
            )
    elif overwrite:
        _check_deletable(folder)
    elif not resume:
        raise UserError(
            f"{folder}: holds a run already; add --resume to go on with it, --overwrite to "
            "delete it, or give another --output"
        )
    else:
        _check_kinds(folder)
        resume_of.check(folder, configs.load_config(folder / CONFIG), config)


def _check_kinds(folder: Path) -> None:
    for names, fits, kind in ((FILES, paths.is_file, "file"), (FOLDERS, paths.is_dir, "folder")):
        for path in (folder / name for name in names):
            if paths.exists(path) and not fits(path):
                raise UserError(f"{path}: is no {kind}, and the run writes one there; move it away")


def _check_links(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if not paths.exists(path) and path.is_symlink():
            raise UserError(
                f"{folder}: {path} is a symbolic link to {os.readlink(path)}, which does not "
                "exist; make that folder, or give another --output"
            )


def _first_stranger(folder: Path) -> str | None:
    """An entry that bars a new run from the folder; files whose names start with a dot do not."""
    if not paths.is_dir(folder):
        return None
    for name in _entries(folder):
        # The manifest comes before the config, so a run killed there leaves it alone.
        if not name.startswith(".") and not (name == MANIFEST and _is_manifest(folder / name)):
            return name
    return None


def _is_manifest(path: Path) -> bool:
    try:
        return "config_sha256" in json_files.read_object(path, "")
    except UserError:
        return False


def _check_deletable(folder: Path) -> None:
    if not paths.exists(folder / MANIFEST):
        raise UserError(
            f"{folder}: no {MANIFEST} in it, so it may not be a run's; delete it yourself, or "
            "give another --output"
        )
    for name in _entries(folder):
        if name not in (LOCK, *OWN) and not re.fullmatch(TEMPORARY, name):
            raise UserError(
                f"{folder}: holds {name}, which is not the run's and which --overwrite would "
                "delete; move it away, or give another --output"
            )


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        raise paths.unreadable(folder, e) from None


@contextlib.contextmanager
def claim(
    config: Config, manifest: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Owner]:
    """Makes the run directory with its manifest and config, or opens that of the run to resume.

    It is this run's alone inside the `with`. Of several processes the first one claims it.

    Args:
      config: of the run.
      manifest: of the run, written if it is a new one.
      resume: go on where the directory's run stopped; a directory without a run starts one.
      overwrite: delete the run that the directory holds.

    Raises:
      UserError: the directory holds a run and neither was asked for, holds something else, was
        made with another config, is another run's that is writing there, or cannot be written to.
    """
    with contextlib.ExitStack() as held:

        def claimed() -> Owner:
            return held.enter_context(_claimed(config, manifest, resume, overwrite))

        yield processes.by_first(claimed) or Guest(Path(config.output))


@contextlib.contextmanager
def _claimed(
    config: Config, manifest: Mapping[str, Any], resume: bool, overwrite: bool
) -> Iterator[Owner]:
    check(config, resume=resume, overwrite=overwrite)
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # as /proc answers
        raise UserError(f"{folder}: no folder can be made there; give another --output") from None
    except OSError as e:
        raise storage_error(folder, e) or e from None
    with owner.own(folder) as owned:
        # once more: another run may have begun, and ended, before the lock was ours
        _check_contents(config, folder, resume=resume, overwrite=overwrite)
        if not holds_run(folder) or overwrite:
            _begin(config, manifest, folder)
        yield owned


def _begin(config: Config, manifest: Mapping[str, Any], folder: Path) -> None:
    """Makes an empty run directory, with what a run's begins with."""
    from qlora_jax.runtime.manifest import write

    if holds_run(folder):
        _clear(folder)
    write(folder, manifest)
    write_config(folder, config)


def write_config(folder: Path, config: Config) -> None:
    """Writes the config of a run into its directory, whole or not at all.

    Raises:
      UserError: the directory cannot be written to.
    """
    with atomic_write(folder / CONFIG) as temporary:
        configs.dump(config, temporary)


def _clear(folder: Path) -> None:
    # The folder itself stays: it may be a link or a mount. Killed on the way, it can be cleared
    # again, since the names that make it a run's go last.
    names = sorted(
        (name for name in _entries(folder) if name != LOCK), key=(MANIFEST, CONFIG).__contains__
    )
    try:
        for name in names:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as e:
        raise storage_error(folder, e) or e from None


def config_at(path: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of a YAML file or of a run directory, with dotted overrides laid over it.

    Raises:
      UserError: it cannot be read, or a setting is not allowed.
    """
    file = Path(path) / CONFIG
    if not paths.is_file(file):
        return configs.load_config(path, overrides)
    # The directory may have been moved, or been named from elsewhere, since it was made.
    return configs.load_config(file, {"output": path} | dict(overrides or {}))


def open_run(folder: str | Path) -> Config:
    """The config of a finished or stopped run.

    Raises:
      UserError: not a run directory.
    """
    if not paths.is_file(Path(folder) / CONFIG):
        raise UserError(
            f"{folder}: not a run directory (no {CONFIG} in it); give a folder that train made"
        )
    return configs.load_config(Path(folder) / CONFIG)
