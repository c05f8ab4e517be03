import os

import pytest

from qlora_jax import config as configs
from qlora_jax.errors import UserError
from qlora_jax.train import rundir


def make(output, **train):
    tree = {"model": {"path": "m"}, "data": {"source": "d"}, "output": str(output), "train": train}
    return configs.from_tree(tree, "test")


def claim(config, resume=False, overwrite=False):
    return rundir.claim(config, resume=resume, overwrite=overwrite)


def test_a_new_run_gets_a_folder_with_its_config(tmp_path):
    config = make(tmp_path / "deep" / "run", steps=7)
    assert claim(config) == tmp_path / "deep" / "run"
    assert rundir.open_run(tmp_path / "deep" / "run") == config
    assert os.listdir(tmp_path / "deep" / "run") == ["config.yaml"]


def test_an_empty_folder_is_taken(tmp_path):
    claim(make(tmp_path))
    assert rundir.open_run(tmp_path).output == str(tmp_path)


def test_resuming_where_there_is_no_run_starts_one(tmp_path):
    claim(make(tmp_path / "run"), resume=True)
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_run_is_not_touched_without_being_told_to(tmp_path):
    claim(make(tmp_path / "run"))
    (tmp_path / "run" / "kept").write_text("x")
    with pytest.raises(UserError, match=r"run: holds a run already; add --resume .* --overwrite"):
        claim(make(tmp_path / "run"))
    assert (tmp_path / "run" / "kept").read_text() == "x"


def test_the_same_config_resumes_and_keeps_what_is_there(tmp_path):
    claim(make(tmp_path / "run"))
    (tmp_path / "run" / "kept").write_text("x")
    assert claim(make(tmp_path / "run"), resume=True) == tmp_path / "run"
    assert (tmp_path / "run" / "kept").read_text() == "x"


def test_a_run_that_was_moved_resumes(tmp_path):
    claim(make(tmp_path / "run"))
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert claim(make(tmp_path / "moved"), resume=True) == tmp_path / "moved"


def test_resuming_with_another_config_lists_the_differences(tmp_path):
    claim(make(tmp_path / "run", steps=7))
    config = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError) as e:
        claim(make(tmp_path / "run", steps=8, batch_size=9), resume=True)
    message = str(e.value)
    assert message.startswith(f"{tmp_path / 'run'}: was made with another config")
    assert message.endswith("; train.batch_size: 4 → 9; train.steps: 7 → 8")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path):
    claim(make(tmp_path / "run", steps=7))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "x").write_text("x")
    claim(make(tmp_path / "run", steps=8), overwrite=True)
    assert os.listdir(tmp_path / "run") == ["config.yaml"]
    assert rundir.open_run(tmp_path / "run").train.steps == 8


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_other_things_is_refused(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=f"^{tmp_path}: exists and is not a run directory"):
        claim(make(tmp_path), **flags)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_file_in_the_way_is_refused(tmp_path, flags):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^{output}: "):
            claim(make(output), **flags)
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    # root may write everywhere, so the system's answer is replaced
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"^{tmp_path / 'a' / 'run'}: {tmp_path} is not writable"):
        claim(make(tmp_path / "a" / "run"))
    assert not os.listdir(tmp_path)


def test_a_folder_that_fails_to_be_made_is_one_clear_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    with pytest.raises(UserError, match=f"^{tmp_path / 'run'}: no space left on this disk"):
        claim(make(tmp_path / "run"))


def test_checking_writes_nothing(tmp_path):
    rundir.check(make(tmp_path / "run"), resume=False, overwrite=False)
    assert not os.listdir(tmp_path)


def test_a_folder_without_a_run_cannot_be_opened(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=rf"^{folder}: not a run directory \(no config.yaml"):
            rundir.open_run(folder)
