import pytest

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError


def test_it_tells_files_from_folders(tmp_path):
    (tmp_path / "file").touch()
    told = {
        name: (paths.exists(p), paths.is_file(p), paths.is_dir(p))
        for name in ("file", "", "none", "file/below")
        if (p := tmp_path / name)
    }
    assert told == {
        "file": (True, True, False),
        "": (True, False, True),
        "none": (False, False, False),
        "file/below": (False, False, False),
    }


@pytest.mark.parametrize("question", ["exists", "is_file", "is_dir"])
def test_a_folder_that_may_not_be_searched_is_the_users_to_open(tmp_path, monkeypatch, question):
    # Tests may run as root, who may search every folder, so the answer is faked.
    def denied(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.stat", denied)
    monkeypatch.setattr(f"pathlib.Path.{question}", denied)
    with pytest.raises(UserError, match=r"^a/b: not readable by this user; "):
        getattr(paths, question)("a/b")


def test_a_path_that_the_system_refuses_is_named():
    name = "a" * 300
    try:
        assert not paths.exists(name)  # from Python 3.14
    except UserError as e:
        assert str(e).startswith(f"{name}: cannot be read: File name too long")  # noqa: PT017
