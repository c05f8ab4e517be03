import datetime
import importlib.metadata
import json
import platform
import subprocess

import jax
import pytest

from qlora_jax import config as config_lib
from qlora_jax.runtime import manifest
from qlora_jax.runtime.errors import UserError

CONFIG = config_lib.from_tree(
    {
        "model": {"path": "m.gguf"},
        "data": {"source": "d.jsonl"},
        "output": "runs/a",
        "train": {"seed": 7},
    },
    "test",
)


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_it_records_what_ran(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    monkeypatch.setenv("JAX_TEST_SETTING", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    command = "qlora-jax train 'my run.yaml'"
    built = json.loads(json.dumps(manifest.build(CONFIG, command, {"base_hash": "2:ab"})))
    assert built["config_sha256"] == config_lib.digest(CONFIG)
    assert config_lib.from_tree(built["config"], "manifest") == CONFIG
    assert built["seed"] == 7
    assert built["base_hash"] == "2:ab"
    assert built["command"] == command
    assert built["environment"]["XLA_FLAGS"] == "--xla_dump_to="
    assert built["environment"]["JAX_TEST_SETTING"] == "1"
    assert "secret" not in json.dumps(built)
    assert built["devices"]["count"] == jax.device_count()
    assert built["machine"]["cores"] >= 1
    versions = built["versions"]
    assert versions["python"] == platform.python_version()
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        assert versions[name] == importlib.metadata.version(name)
    assert "qlora-jax" in versions


def test_the_times_are_utc(tmp_path):
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    manifest.write(tmp_path, manifest.build(CONFIG, ""))
    assert manifest.read(tmp_path)["finished"] is None
    manifest.finish(tmp_path, {"steps": 3})
    written = manifest.read(tmp_path)
    started, finished = (
        datetime.datetime.fromisoformat(written[k]) for k in ("started", "finished")
    )
    assert started.utcoffset() == datetime.timedelta(0)
    assert before <= started <= finished <= datetime.datetime.now(datetime.UTC)
    assert written["steps"] == 3


def test_an_extra_entry_cannot_hide_a_recorded_one():
    with pytest.raises(ValueError, match="seed"):
        manifest.build(CONFIG, "", {"seed": 8})


def test_a_resumed_run_keeps_its_earlier_sessions(tmp_path):
    for number in range(3):
        built = manifest.build(CONFIG, f"session {number}", {"base_hash": f"base {number}"})
        manifest.write(tmp_path, built, resumed=number > 0)
    written = manifest.read(tmp_path)
    assert written["command"] == "session 2"
    assert [s["command"] for s in written["earlier"]] == ["session 0", "session 1"]
    assert [s["base_hash"] for s in written["earlier"]] == ["base 0", "base 1"]
    assert all("versions" in s and "config" not in s for s in written["earlier"])
    manifest.write(tmp_path, built)
    assert "earlier" not in manifest.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json: not .*JSON"):
        manifest.read(tmp_path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"manifest.json: no such file"):
        manifest.read(tmp_path)


def test_the_commit_is_that_of_the_code(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    assert manifest.git_state(package) is None
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert manifest.git_state(package) == {"commit": commit, "modified": False}
    (package / "a.py").write_text("2")
    assert manifest.git_state(package) == {"commit": commit, "modified": True}


def test_no_commit_for_code_installed_inside_another_repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a").touch()
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    package = tmp_path / "venv" / "package"
    package.mkdir(parents=True)
    (package / "a.py").touch()
    assert manifest.git_state(package) is None


def test_no_git_is_no_failure(tmp_path, monkeypatch):
    assert manifest.git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert manifest.git_state() is None
    assert manifest.build(CONFIG, "")["git"] is None


def test_a_manifest_of_a_newer_format_is_refused(tmp_path):
    built = manifest.build(CONFIG, "")
    assert built["format"] == 1
    manifest.write(tmp_path, built | {"format": 2})
    with pytest.raises(UserError, match=r"manifest.json: of format 2, and this program reads up"):
        manifest.read(tmp_path)
