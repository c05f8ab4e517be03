"""Builds a wheel, installs it beside only its dependencies, and runs its commands."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qlora_jax.cli import COMMANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlora_jax"
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
OFFLINE = 77
"""The major version of setuptools from which this project can be built without a download."""


class Ended(NamedTuple):
    """Result of a command: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


class Installed:
    """A fresh environment that holds the wheel, and an empty folder to start commands in.

    Attributes:
      python: interpreter of the environment.
      wheel: the wheel that is installed.
      folder: current folder of the commands.
    """

    def __init__(self, python: Path, wheel: Path, folder: Path) -> None:
        self.python, self.wheel, self.folder = python, wheel, folder

    def start(self, *arguments: str | Path) -> Ended:
        """Runs a program of the environment in `folder`."""
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        for name in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES"):
            environment.pop(name, None)
        done = subprocess.run(
            [self.python.parent / str(arguments[0]), *map(str, arguments[1:])],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def __call__(self, *arguments: str | Path) -> Ended:
        """Runs a command of qlora-jax."""
        return self.start("qlora-jax", *arguments)


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools writes into the folder that it builds.
    source = base / "source"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILD_FILES:
        shutil.copyfile(ROOT / name, source / name)
    major = int(importlib.metadata.version("setuptools").split(".")[0])
    isolation = ["--no-build-isolation"] if major >= OFFLINE else []
    pip("wheel", "--no-deps", *isolation, "--wheel-dir", base / "wheels", source)
    (wheel,) = (base / "wheels").glob("*.whl")

    venv.create(base / "environment", symlinks=True, with_pip=False)
    python = base / "environment" / "bin" / "python"
    (own,) = (base / "environment" / "lib").glob("python*/site-packages")
    # Lists the dependencies' folder. Its .pth files are not read, so an editable install of the
    # checkout in it has no effect.
    (own / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    pip("--python", python, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    folder = base / "empty"
    folder.mkdir()
    return Installed(python, wheel, folder)


def test_the_wheel_is_what_runs(installed: Installed) -> None:
    code = "import qlora_jax, qlora_jax.cli; print(qlora_jax.__file__)"
    ended = installed.start("python", "-c", code)
    assert ended.code == 0, ended.err
    assert Path(ended.out.strip()).is_relative_to(installed.python.parents[1])


def test_the_wheel_holds_every_file_of_the_package(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert held == files
    assert {Path(name).suffix for name in held} >= {".py", ".txtpb", ".jinja"}


def test_every_command_has_its_help(installed: Installed) -> None:
    for command in COMMANDS:
        ended = installed(command, "--help")
        assert ended.code == 0, ended.err
        assert ended.out.startswith(f"usage: qlora-jax {command}")
        assert ended.err == ""


def test_a_run_is_trained_evaluated_and_asked(
    installed: Installed, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, train__steps=2)
    run = tmp_path / "run"
    ended = installed("train", config, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["steps"] == 2
    assert "base unchanged" in ended.err
    ended = installed("generate", run, "--prompt", "What does chr do?", "--max-new-tokens", "4")
    assert ended.code == 0, ended.err
    assert ended.out
    ended = installed("evaluate", run, "--json")
    assert ended.code == 0, ended.err
    ended = installed("export", run, tmp_path / "exported")
    assert ended.code == 0, ended.err
    assert (tmp_path / "exported" / "adapter_config.json").is_file()


def test_a_plan_names_what_the_compiler_needs(installed: Installed) -> None:
    ended = installed("plan", "--model", "llama-7b", "--gpu", "t4", "--no-search")
    assert ended.code == 0, ended.err
    assert "fits" in ended.out
    if "Estimate: the ledger alone" in ended.out:  # the extra gpu-check is not installed
        assert "pip install 'qlora-jax[gpu-check]'" in ended.out


def test_an_experiment_of_a_file_runs(
    installed: Installed, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, train__steps=2, train__eval_rows=4)
    file = shutil.copyfile(ROOT / "examples" / "ranks.py", tmp_path / "ranks.py")
    settings = ("--set", f"config={config}", "--set", "rank=2", "--seeds", "0,1")
    ended = installed("sweep", file, *settings, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "2 done; results:" in ended.out
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (("train", "configs/quickstart.yaml"), "configs/"),
        (("plan", "configs/article_7b_t4.yaml"), "configs/"),
        (("pretrain", "configs/pretrain_1m.yaml"), "configs/"),
        (("sweep", "rank"), "experiments/"),
        (("sweep", "experiments/rank.py"), "experiments/"),
    ],
)
def test_a_file_of_the_repository_is_named_with_its_place(
    installed: Installed, command: tuple[str, str], folder: str
) -> None:
    ended = installed(*command)
    assert ended.code == 2
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith(f"qlora-jax: {command[1]}: no such ")
    assert f"in {folder} are part of the repository, not of the installed package" in line
    assert "start the command in a clone of the repository" in line
    assert list(installed.folder.iterdir()) == []
