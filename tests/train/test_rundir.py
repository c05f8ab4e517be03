import os
from pathlib import Path

import pytest

from qlora_jax import config as configs
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import rundir

BEGUN = [".lock", "config.yaml", "manifest.json"]
"""Files in the directory of a run that has begun."""


def make(output, **train):
    tree = {"model": {"path": "m"}, "data": {"source": "d"}, "output": str(output), "train": train}
    return configs.from_tree(tree, "test")


def claim(config, resume=False, overwrite=False):
    manifest = {"config_sha256": configs.digest(config)}
    with rundir.claim(config, manifest, resume=resume, overwrite=overwrite) as owned:
        return owned.folder


def killed_at(moment, config, monkeypatch):
    """Claims a folder like a process that is killed before it writes the file `moment`."""

    class Killed(BaseException):
        pass

    replace = os.replace

    def until(old, new):
        if os.path.basename(new) == moment:
            raise Killed
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until)
        # a killed process does not clean up its files
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            claim(config)


def test_a_new_run_gets_a_folder_with_its_config_and_manifest(tmp_path):
    config = make(tmp_path / "deep" / "run", steps=7)
    assert claim(config) == tmp_path / "deep" / "run"
    assert rundir.open_run(tmp_path / "deep" / "run") == config
    assert sorted(os.listdir(tmp_path / "deep" / "run")) == BEGUN


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


@pytest.mark.parametrize("name", [name for name in rundir.OWN if name != "config.yaml"])
def test_what_a_resumed_run_could_not_replace_is_named_first(tmp_path, name):
    config = make(tmp_path / "run")
    claim(config)
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    if name in rundir.FILES:
        path.mkdir()
    else:
        path.write_text("a")
    kind = "file" if name in rundir.FILES else "folder"
    for act in (
        lambda: rundir.check(config, resume=True, overwrite=False),
        lambda: claim(config, True),
    ):
        with pytest.raises(UserError, match=f"{path}: is not a {kind}, but the run writes one;"):
            act()


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
    assert "; train.batch_size: 4 → 9; leave these as they were" in message
    assert "(these may change on resume: train.steps, " in message
    assert "train.steps: 7" not in message
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path):
    claim(make(tmp_path / "run", steps=7))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "x").write_text("x")
    claim(make(tmp_path / "run", steps=8), overwrite=True)
    assert sorted(os.listdir(tmp_path / "run")) == BEGUN
    assert rundir.open_run(tmp_path / "run").train.steps == 8


@pytest.mark.parametrize("moment", ["manifest.json", "config.yaml"])
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_killed_while_it_claims_its_folder_can_be_started_again(
    tmp_path, monkeypatch, moment, flags
):
    killed_at(moment, make(tmp_path / "run", steps=7), monkeypatch)
    assert os.listdir(tmp_path / "run")
    claim(make(tmp_path / "run", steps=8), **flags)
    assert rundir.open_run(tmp_path / "run").train.steps == 8


def test_a_run_killed_before_its_first_checkpoint_is_resumed_and_overwritten(tmp_path, monkeypatch):
    config = make(tmp_path / "run")
    killed_at("config.yaml", config, monkeypatch)
    claim(config)
    (tmp_path / "run" / ".adapter-x1_").mkdir()
    claim(config, resume=True)
    claim(make(tmp_path / "run", steps=8), overwrite=True)
    assert sorted(os.listdir(tmp_path / "run")) == BEGUN


@pytest.mark.parametrize("moment", rundir.OWN)
def test_overwriting_that_fails_on_the_way_can_be_done_again(tmp_path, monkeypatch, moment):
    config = make(tmp_path / "run")
    claim(config)
    for name in rundir.OWN:
        (tmp_path / "run" / name).touch()
    unlink = Path.unlink

    def refuse(path, **_):
        if path.name == moment:
            raise OSError(13, "Permission denied", str(path))
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(UserError, match="run: not writable"):
            claim(config, overwrite=True)
    claim(config, overwrite=True)
    assert sorted(os.listdir(tmp_path / "run")) == BEGUN


@pytest.mark.parametrize("stranger", ["thesis.tex", ".git", "config.yml"])
def test_overwriting_never_deletes_what_is_not_the_runs(tmp_path, stranger):
    claim(make(tmp_path / "run"))
    (tmp_path / "run" / stranger).mkdir()
    (tmp_path / "run" / stranger / "work").write_text("x")
    with pytest.raises(UserError, match=f"run: holds {stranger}, which is not the run's"):
        claim(make(tmp_path / "run"), overwrite=True)
    assert (tmp_path / "run" / stranger / "work").read_text() == "x"
    assert sorted(os.listdir(tmp_path / "run")) == sorted([*BEGUN, stranger])


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_with_a_config_of_the_users_is_no_run(tmp_path, flags):
    configs.dump(make(tmp_path), tmp_path / "config.yaml")
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(UserError, match=r"not a run directory \(it holds config.yaml\)"):
        claim(make(tmp_path), **flags)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "data.jsonl"]


def test_checkpoints_without_a_manifest_are_resumed_and_never_deleted(tmp_path):
    claim(make(tmp_path / "run"))
    (tmp_path / "run" / "manifest.json").unlink()
    (tmp_path / "run" / "checkpoints").mkdir()
    claim(make(tmp_path / "run"), resume=True)
    with pytest.raises(UserError, match=r"run: no manifest.json in it"):
        claim(make(tmp_path / "run"), overwrite=True)
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}])
def test_another_programs_manifest_is_left_alone(tmp_path, flags):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UserError, match=r"not a run directory \(it holds manifest.json\)"):
        claim(make(tmp_path), **flags)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'


def test_hidden_files_are_no_run_and_stay(tmp_path):
    (tmp_path / ".gitkeep").touch()
    claim(make(tmp_path), overwrite=True)
    assert (tmp_path / ".gitkeep").exists()


def test_an_output_that_is_a_link_is_the_folder_it_names(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    claim(make(tmp_path / "run", steps=7))
    claim(make(tmp_path / "run", steps=7), resume=True)
    (tmp_path / "disk" / "metrics.jsonl").touch()
    claim(make(tmp_path / "run", steps=8), overwrite=True)
    assert (tmp_path / "run").is_symlink()
    assert rundir.open_run(tmp_path / "disk").train.steps == 8
    assert not (tmp_path / "disk" / "metrics.jsonl").exists()


@pytest.mark.parametrize("output", ["run", "run/below"])
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_link_to_nothing_is_named(tmp_path, flags, output):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"/run is a symbolic link to .*/gone, which does not"):
        claim(make(tmp_path / output), **flags)


def test_what_lies_in_a_linked_checkpoints_folder_stays(tmp_path):
    claim(make(tmp_path / "run"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "kept").touch()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "shared")
    claim(make(tmp_path / "run"), overwrite=True)
    assert (tmp_path / "shared" / "kept").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


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
    # root may write everywhere, so os.access is replaced
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
