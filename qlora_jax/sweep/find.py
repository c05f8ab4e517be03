"""Experiments by name, and cells by what they must have."""

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
FOLDERS = Path("experiments"), Path(__file__).parents[2] / "experiments"
"""Where experiments are looked for: the current folder's, then this checkout's."""


def find(name: str, folders: Iterable[Path] = FOLDERS) -> Path:
    """The file of an experiment: a path of a .py file, or a name such as `rank` or `part/rank`.

    Raises:
      UserError: there is none; the nearest name is given.
    """
    if name.endswith(".py"):
        if not paths.is_file(name):
            raise UserError(f"{name}: no such file; give an experiment's name or its .py file")
        return Path(name).resolve()
    known = {n: path for folder in reversed(list(folders)) for n, path in _experiments(folder)}
    if name in known:
        return known[name]
    if not known:
        raise UserError(
            f"{name}: no such experiment: there is no folder experiments/ with any; start where "
            "there is one, or give the experiment's .py file"
        )
    nearest = max(known, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
    raise UserError(
        f"{name}: no such experiment; the nearest is {nearest} (all: {', '.join(sorted(known))})"
    )


def load_experiment(path: Path) -> Experiment:
    """The experiment that a file declares.

    A file in a package is loaded as a module of it: it imports the package's other modules as
    usual, `from experiments import cells`, from wherever the program is started. Any other file
    can import the modules beside it by their names.

    Raises:
      UserError: the file cannot be run, or declares none.
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
    """Imports the package that a folder is, after those it lies in, and returns its dotted name.

    Returns:
      An empty string for a folder that is no package.

    Raises:
      UserError: a package of this name was imported from another folder.
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
    """Returns a module name for a file in no package, and lets it import what lies beside it."""
    # As Python does for a script, but last: the file's neighbours hide no installed package.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # two folders may have files of one name
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _run(name: str, path: Path) -> ModuleType:
    """Runs a file as the module of this name, which others can import from then on."""
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
    """The experiment with other values on some axes, each given as `axis=value,value`.

    A value is JSON where it can be read as such, else text. Cells beside the grid (`more`) take
    every new value too.

    Raises:
      UserError: an axis that the experiment does not have.
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
    """The cells that meet every condition `axis=value` or `axis=value,value`.

    Raises:
      UserError: a condition on an axis or a value that no cell has, or that together none meets.
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
        # a value may have commas of its own
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
    """Whether a file assigns the name at its top level; it is not run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return False
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(t, ast.Name) and t.id == NAME for t in targets)
