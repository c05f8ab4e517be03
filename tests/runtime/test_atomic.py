import errno
import os
import stat
from pathlib import Path

import pytest

from qlora_jax.runtime.atomic import atomic_write, storage_error, write_text
from qlora_jax.runtime.errors import UserError


def test_the_new_content_replaces_the_old(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_text(path, "new → ü\n")
    assert path.read_bytes() == "new → ü\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_nothing_shows_under_the_name_before_the_end(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "half"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_file_gets_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "atomic")}
    assert len(modes) == 1


def full_disk():
    with open("/dev/full", "w") as f:
        f.write("x")


def test_a_full_disk_names_the_folder_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError) as caught, atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        full_disk()
    assert str(caught.value).startswith(f"{tmp_path}: no space left")
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_the_users(tmp_path, number):
    refused = pytest.raises(UserError, match=f"^{tmp_path}: .*another folder")
    with refused, atomic_write(tmp_path / "a") as temporary:
        raise OSError(number, os.strerror(number), str(temporary))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/none: no such folder"):
        write_text(tmp_path / "none" / "a", "")


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/file: not a folder"):
        write_text(tmp_path / "file" / "a", "")


def test_a_folder_in_the_files_place_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/a: is a folder"):
        write_text(tmp_path / "a", "")
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_file_that_the_body_reads_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "a"):
        Path(tmp_path / "elsewhere").read_text()


def test_an_error_reported_by_a_rust_library_is_understood(tmp_path):
    error = RuntimeError("I/O error: No space left on device (os error 28)")
    assert "no space left" in str(storage_error(tmp_path, error))
    assert storage_error(tmp_path, RuntimeError("something else")) is None
