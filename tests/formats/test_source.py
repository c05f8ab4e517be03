import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors as hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from qlora_jax.config import ModelConfig
from qlora_jax.formats import source
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Replaces the hub: records the requests, and copies a folder's files or raises."""
    calls: list[tuple[str, str | None]] = []

    def install(result) -> list[tuple[str, str | None]]:
        def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((repository, revision))
            if isinstance(result, Exception):
                raise result
            folder = tmp_path / "snapshot"
            folder.mkdir()
            for name in filter_repo_objects(os.listdir(result), allow_patterns=allow_patterns):
                shutil.copyfile(result / name, folder / name)
            return str(folder)

        monkeypatch.setattr(source, "snapshot_download", download)
        return calls

    return install


def test_opens_a_folder(models: Path) -> None:
    assert open_checkpoint(ModelConfig(path=str(models / "qwen2"))).config.family == "qwen2"


def test_opens_a_builtin_model(builtin_gguf: Path) -> None:
    assert open_checkpoint(ModelConfig(path="smollm2-135m-instruct")).path == builtin_gguf
    assert open_checkpoint(ModelConfig(path=str(builtin_gguf))).path == builtin_gguf


def test_opens_a_hub_id_at_its_revision(models: Path, snapshot) -> None:
    calls = snapshot(models / "llama")
    checkpoint = open_checkpoint(ModelConfig(path="owner/name", revision="v1"))
    assert checkpoint.names() == open_folder(models / "llama").names()
    assert calls == [("owner/name", "v1")]


def test_all_that_is_read_is_downloaded(make_model, tmp_path: Path, snapshot) -> None:
    there = make_model(tmp_path / "there")
    # end-of-sequence ids that the tokenizer files do not name
    (there / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    snapshot(there)
    here = open_checkpoint(ModelConfig(path="owner/name")).tokenizer_path
    assert here != there
    stop_ids = tokenizer.load_tokenizer(here).stop_ids
    assert {7, 9} < set(stop_ids)
    assert stop_ids == tokenizer.load_tokenizer(there).stop_ids


def test_the_same_weights_in_other_formats_are_not_downloaded(models, tmp_path, snapshot) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(models / "llama" / name, there / name)
    wanted = {*tokenizer.FOLDER_FILES, *tokenizer.END_FILES, "model.safetensors"}
    for name in wanted | {"consolidated.safetensors", "pytorch_model.bin", "README.md"}:
        (there / name).touch()
    snapshot(there)
    here = open_checkpoint(ModelConfig(path="owner/name")).path
    assert {p.name for p in here.iterdir()} == wanted


@pytest.mark.parametrize(
    "path", ["./model", "/no/model", "model.gguf", "a/b/c", "~/model", "m.json"]
)
def test_a_missing_local_path_never_asks_the_hub(path: str, snapshot) -> None:
    calls = snapshot(AssertionError("asked the hub"))
    with pytest.raises(UserError, match="no such file or folder"):
        open_checkpoint(ModelConfig(path=path))
    assert calls == []


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub.RepositoryNotFoundError("x", response=RESPONSE), "owner/name: no such model"),
        (hub.RevisionNotFoundError("x", response=RESPONSE), "has no revision 'v9'"),
        (hub.GatedRepoError("x", response=RESPONSE), "access is restricted"),
        (hub.LocalEntryNotFoundError("x"), "not in the local hub cache"),
        (hub.HFValidationError("x"), "not a folder, a file, a hub id"),
        (hub.HfHubHTTPError("down\nfor now", response=RESPONSE), r"download failed \(down\)"),
    ],
)
def test_hub_failures_are_one_line(error: Exception, says: str, snapshot) -> None:
    snapshot(error)
    with pytest.raises(UserError, match=says) as e:
        open_checkpoint(ModelConfig(path="owner/name", revision="v9"))
    assert "\n" not in str(e.value)


def test_other_files_and_needless_revisions_are_refused(models: Path) -> None:
    with pytest.raises(UserError, match="give the folder"):
        open_checkpoint(ModelConfig(path=str(models / "llama" / "model.safetensors")))
    with pytest.raises(UserError, match=r"model\.revision"):
        open_checkpoint(ModelConfig(path=str(models / "llama"), revision="main"))
