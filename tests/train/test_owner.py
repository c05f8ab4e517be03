"""Only one run at a time writes to a run directory, and only to the folder it claimed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.runtime.errors import UserError
from qlora_jax.train.owner import LOCK, check_free, claim_folder

HOLDER = """
import pathlib, sys, time
from qlora_jax.train.owner import claim_folder
with claim_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_owner_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    with claim_folder(tmp_path) as first:
        assert first.folder == tmp_path
        first.check()
        with (
            pytest.raises(UserError, match="another run is writing there; wait for it"),
            claim_folder(tmp_path),
        ):
            pass
        with pytest.raises(UserError, match="another run is writing there"):
            check_free(tmp_path)
        first.check()
    check_free(tmp_path)
    with claim_folder(tmp_path):
        pass


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claim_folder(tmp_path):
        raise ZeroDivisionError
    check_free(tmp_path)


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run"):
        check_free(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with claim_folder(tmp_path):
        pass


def test_asking_changes_nothing(tmp_path: Path) -> None:
    check_free(tmp_path)
    check_free(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def deleted(folder: Path) -> None:
    shutil.rmtree(folder)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replaced(folder: Path) -> None:
    moved(folder)
    shutil.copytree(folder.with_name("moved"), folder)


def emptied(folder: Path) -> None:
    (folder / LOCK).unlink()
    (folder / LOCK).touch()


@pytest.mark.parametrize("change", [deleted, moved, replaced, emptied])
def test_another_folder_is_not_written_to(tmp_path: Path, change) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with claim_folder(folder) as owner:
        owner.check()
        change(folder)
        with pytest.raises(UserError, match="was deleted, moved or replaced while the run was"):
            owner.check()


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with claim_folder(tmp_path / "link") as owner:
        owner.check()
        with pytest.raises(UserError, match="another run"):
            check_free(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not writable"), claim_folder(tmp_path):
        pass
