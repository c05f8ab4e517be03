"""Creates run directories, claims them for a new or resumed run, and reads their config."""

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
"""All names that a run writes into its directory, except the lock file, which is never deleted."""
TEMPORARY = (
    r"\.(config|manifest|metrics|samples|report|loss_curve)\.[0-9a-f]{8}\.\w+|\.(adapter|model)-\w+"
)
"""Pattern of temporary files that may remain if a run is killed while it writes."""


def holds_run(folder: str | Path) -> bool:
    """Returns whether the folder holds a run that has begun.

    Raises:
      UserError: the user may not search the folder.
    """
    folder = Path(folder)
    begun = paths.exists(folder / MANIFEST) or paths.is_dir(folder / CHECKPOINTS)
    return begun and paths.is_file(folder / CONFIG)


def check(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Raises the errors of `claim` that can be found without writing; takes little time."""
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
                raise UserError(f"{path}: is not a {kind}, but the run writes one; move it away")


def _check_links(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if not paths.exists(path) and path.is_symlink():
            raise UserError(
                f"{folder}: {path} is a symbolic link to {os.readlink(path)}, which does not "
                "exist; make that folder, or give another --output"
            )


def _first_stranger(folder: Path) -> str | None:
    """Returns the first entry that forbids a new run in the folder; hidden entries do not."""
    if not paths.is_dir(folder):
        return None
    for name in _entries(folder):
        # The manifest is written before the config, so a killed run may leave only the manifest.
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
    """Creates the run directory with manifest and config, or opens that of the run to resume.

    Inside the `with`, no other run can claim the directory. In a run of several processes, only the
    first process claims it.

    Args:
      config: config of the run.
      manifest: manifest of the run; written if the run is new.
      resume: whether to continue the run in the directory; without a run there, a new one begins.
      overwrite: whether to delete the run in the directory.

    Raises:
      UserError: the directory holds a run and both `resume` and `overwrite` are False; it holds
        other files; its run has another config; another run is writing there; or it cannot be
        written to.
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
    except FileNotFoundError:  # the error of /proc
        raise UserError(f"{folder}: no folder can be made there; give another --output") from None
    except OSError as e:
        raise storage_error(folder, e) or e from None
    with owner.claim_folder(folder) as owned:
        # check again: another run may have begun and ended before this one got the lock
        _check_contents(config, folder, resume=resume, overwrite=overwrite)
        if not holds_run(folder) or overwrite:
            _begin(config, manifest, folder)
        yield owned


def _begin(config: Config, manifest: Mapping[str, Any], folder: Path) -> None:
    """Empties the run directory, and writes the manifest and the config."""
    from qlora_jax.runtime.manifest import write

    if holds_run(folder):
        _clear(folder)
    write(folder, manifest)
    write_config(folder, config)


def write_config(folder: Path, config: Config) -> None:
    """Writes the config of a run into its directory, completely or not at all.

    Raises:
      UserError: the directory cannot be written to.
    """
    with atomic_write(folder / CONFIG) as temporary:
        configs.dump(config, temporary)


def _clear(folder: Path) -> None:
    # The folder itself is not deleted, because it may be a link or a mount. The manifest and the
    # config are deleted last, so that a folder cleared halfway is still known as a run directory.
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
    """Returns the config of a YAML file or a run directory, with dotted overrides applied.

    Raises:
      UserError: the file cannot be read, or a setting is not allowed.
    """
    file = Path(path) / CONFIG
    if not paths.is_file(file):
        return configs.load_config(path, overrides)
    # the directory may have been moved, or be given by another path
    return configs.load_config(file, {"output": path} | dict(overrides or {}))


def open_run(folder: str | Path) -> Config:
    """Returns the config of a finished or stopped run.

    Raises:
      UserError: the folder is not a run directory.
    """
    if not paths.is_file(Path(folder) / CONFIG):
        raise UserError(
            f"{folder}: not a run directory (no {CONFIG} in it); give a folder that train made"
        )
    return configs.load_config(Path(folder) / CONFIG)
