"""Tests where an experiment's file may be, and which modules it can import there."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep import find

ROOT = Path(__file__).parents[2]

MODULE = """
{imported}
from qlora_jax.sweep import Analysis, Experiment, Verdict

EXPERIMENT = Experiment(
    name="made", question="?", paper="-", expected="-", cost=helper.COST, axes={{"rank": [1]}},
    run=lambda cell, context: {{"cost": helper.COST}}, seeds=(),
    analyse=lambda table: Analysis(Verdict(table.rows[0]["cost"], None, "agrees")),
)
"""


def write(folder: Path, imported: str, cost: str = "nothing", package: bool = True) -> Path:
    """Writes an experiment and the helper that it imports; returns the experiment's file."""
    folder.mkdir(parents=True)
    if package:
        (folder / "__init__.py").touch()
    (folder / "helper.py").write_text(f"COST = {cost!r}\n")
    (folder / "made.py").write_text(MODULE.format(imported=imported))
    return folder / "made.py"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes the test packages from sys.modules before and after the test: each import is new."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = taken()
    yield
    taken()
    sys.modules.update(before)


def taken() -> dict[str, ModuleType]:
    """Removes the test packages from sys.modules and returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("experiments", "studies")]
    return {name: sys.modules.pop(name) for name in names}


def test_a_file_in_a_package_imports_from_it(tmp_path: Path) -> None:
    path = write(tmp_path / "studies" / "part", "from studies.part import helper", "in a package")
    (tmp_path / "studies" / "__init__.py").touch()
    before = sys.path.copy()
    assert find.load_experiment(path).cost == "in a package"
    assert sys.path == before


def test_a_file_in_no_package_imports_what_lies_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path / "experiments", "import helper", "beside", package=False)
    assert find.load_experiment(path).cost == "beside"


def test_two_packages_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    first, second = (
        write(tmp_path / where / "studies", "from studies import helper", where)
        for where in ("here", "there")
    )
    assert find.load_experiment(first).cost == "here"
    with pytest.raises(UserError, match=f"{second.parent}: another package studies is imported"):
        find.load_experiment(second)
    assert find.load_experiment(first).cost == "here"


def test_a_package_that_cannot_be_imported_is_told_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "studies", "from studies import helper")
    (path.parent / "__init__.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"made\.py: ZeroDivisionError: division by zero"):
            find.load_experiment(path)


def test_workers_find_the_package_too(
    tmp_path: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "experiments", "from experiments import helper", "told by a worker")
    monkeypatch.chdir(tmp_path)
    ended = run_cli("sweep", "made")
    assert ended.code == 0, ended.err
    assert "told by a worker" in ended.out


@pytest.mark.slow
def test_ours_run_where_the_checkout_is_not_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "qlora_jax").symlink_to(ROOT / "qlora_jax")
    path = ROOT / "experiments" / "forgetting.py"
    done = subprocess.run(
        [sys.executable, "-m", "qlora_jax", "sweep", path, "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "27 cells" in done.stdout
