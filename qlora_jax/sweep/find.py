"""Finds and loads experiments by name, and selects cells by conditions on their values."""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError, first_line
from qlora_jax.sweep.experiment import Cell, Experiment, text

NAME = "EXPERIMENT"
FOLDER = "experiments"
FOLDERS = Path(FOLDER), Path(__file__).parents[2] / FOLDER
"""Folders to search for experiments: in the current folder, then in the clone of the repository."""

IN_REPOSITORY = (
    f"The experiments in {FOLDER}/ are part of the repository, not of the installed package: start "
    "the command in a clone of the repository"
)
"""Part of the error message if no experiments are found."""


def find(name: str, folders: Iterable[Path] = FOLDERS) -> Path:
    """Returns the file of an experiment.

    Args:
      name: path of a .py file, or a name such as `rank` or `part/rank`.
      folders: folders to search; the first folder with the name counts.

    Raises:
      UserError: there is no such file or experiment; the message contains the nearest name.
    """
    if name.endswith(".py"):
        if not paths.is_file(name):
            told = f"{name}: no such file; give an experiment's name or its .py file"
            missing = Path(name).parts[:1] == (FOLDER,) and not Path(FOLDER).is_dir()
            raise UserError(f"{told}. {IN_REPOSITORY}" if missing else told)
        return Path(name).resolve()
    known = {n: path for folder in reversed(list(folders)) for n, path in _experiments(folder)}
    if name in known:
        return known[name]
    if not known:
        raise UserError(
            f"{name}: no such experiment; the current folder has no folder {FOLDER}/ that holds "
            f"one. {IN_REPOSITORY}, or give an experiment's .py file"
        )
    nearest = max(known, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
    raise UserError(
        f"{name}: no such experiment; the nearest is {nearest} (all: {', '.join(sorted(known))})"
    )


def load_experiment(path: Path) -> Experiment:
    """Returns the experiment that a file declares.

    A file in a package is loaded as a module of this package. It can import the other modules of
    the package (`from experiments import cells`), also if the program was started in another
    folder. A file outside a package can import the modules in its folder by their names.

    Raises:
      UserError: the file raises an exception, or declares no experiment.
    """
    try:
        package = _package(path.parent.resolve())
        module = _run(f"{package}.{path.stem}" if package else _own_name(path), path)
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"{path}: {type(e).__name__}: {first_line(e)}; correct it (--debug shows where)"
        ) from e
    experiment = getattr(module, NAME, None)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path}: declares no {NAME} = Experiment(...); add one")
    return experiment


def _package(folder: Path) -> str:
    """Imports the package in a folder, after its parent packages, and returns its dotted name.

    Returns:
      The name; an empty string if the folder is not a package.

    Raises:
      UserError: a package with this name was already imported from another folder.
    """
    init = folder / "__init__.py"
    if not init.is_file():
        return ""
    outer = _package(folder.parent)
    name = f"{outer}.{folder.name}" if outer else folder.name
    known = getattr(sys.modules.get(name) or _run(name, init), "__file__", None)
    if known is None or not init.samefile(known):
        raise UserError(f"{folder}: another package {name} is imported already; rename the folder")
    return name


def _own_name(path: Path) -> str:
    """Returns a module name for a file outside a package; lets it import modules of its folder."""
    # The folder comes last in the path (Python puts a script's folder first), so that a module in
    # it cannot hide an installed package.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # the hash tells files with the same name in two folders apart
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _run(name: str, path: Path) -> ModuleType:
    """Runs a file as a module with this name; afterwards other modules can import it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def with_axes(experiment: Experiment, settings: Sequence[str]) -> Experiment:
    """Returns the experiment with new values on some axes.

    Args:
      experiment: experiment to change.
      settings: new values of an axis, each entry as `axis=value,value`. A value is parsed as JSON
        if possible; else it is text. Each cell in `more` is repeated for every new value.

    Raises:
      UserError: the experiment does not have such an axis.
    """
    for setting in settings:
        axis, equals, wanted = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as AXIS=VALUE or AXIS=VALUE,VALUE")
        if axis not in experiment.axes:
            raise UserError(
                f"--set {setting}: no such axis; there are: {', '.join(experiment.axes)}"
            )
        values = [_read(part) for part in wanted.split(",")]
        experiment = dataclasses.replace(
            experiment,
            axes={**experiment.axes, axis: values},
            more=[{**point, axis: value} for point in experiment.more for value in values],
        )
    return experiment


def _read(option: str) -> Any:
    try:
        return json_files.parse(option)
    except ValueError:
        return option


def where(cells: Sequence[Cell], conditions: Sequence[str]) -> list[Cell]:
    """Returns the cells that meet every condition `axis=value` or `axis=value,value`.

    Raises:
      UserError: a condition names an axis or a value that no cell has, or no cell meets all
        conditions.
    """
    left = list(cells)
    for condition in conditions:
        axis, equals, wanted = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write it as AXIS=VALUE or AXIS=VALUE,VALUE")
        axes = dict.fromkeys(axis for cell in cells for axis in cell.values)
        if axis not in axes:
            raise UserError(f"--where {condition}: no such axis; there are: {', '.join(axes)}")
        values = {text(cell[axis]): cell[axis] for cell in cells}
        # a value itself may contain commas
        options = [wanted] if wanted in values else wanted.split(",")
        for option in options:
            if not any(_is(option, value) for value in values.values()):
                raise UserError(
                    f"--where {condition}: no cell has {axis}={option}; "
                    f"there are: {', '.join(values)}"
                )
        left = [cell for cell in left if any(_is(option, cell[axis]) for option in options)]
    if not left:
        raise UserError(
            f"--where {' --where '.join(conditions)}: no cell meets all of them; leave one out"
        )
    return left


def _is(option: str, value: Any) -> bool:
    if option == text(value):
        return True
    try:
        parsed = json_files.parse(option)
    except ValueError:
        return False
    return type(parsed) in (int, float) and type(value) in (int, float) and parsed == value


def _experiments(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.resolve().rglob("*.py")):
        if _declares(path):
            yield path.relative_to(folder.resolve()).with_suffix("").as_posix(), path


def _declares(path: Path) -> bool:
    """Returns whether a file assigns `EXPERIMENT` at its top level; does not run the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return False
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(t, ast.Name) and t.id == NAME for t in targets)
