"""A run made before hashes had versions is resumed, evaluated and merged like any other."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.models import trees
from qlora_jax.runtime import manifest
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.restore import check_base, restore

pytestmark = pytest.mark.quick

CHANGED = "the model's weights differ from those at the run's first step"


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
) -> Path:
    """The config of a finished run."""
    config = write_config(tmp_path_factory.mktemp("old"))
    ended = run_cli("train", config)
    assert ended.code == 0, ended.err
    return config


def rewrite(folder: Path, **hashes: str) -> None:
    """Replaces the hashes in the manifest by the given ones."""
    told = manifest.read(folder)
    told.pop("base_hash", None)
    told.pop("base_sha256", None)
    manifest.write(folder, told | hashes)


def test_a_manifest_gives_its_hash_with_the_version() -> None:
    assert manifest.base_hash({"base_sha256": "ab"}) == "1:ab"
    assert manifest.base_hash({"base_hash": "2:cd"}) == "2:cd"
    assert manifest.base_hash({}) is None


@pytest.mark.slow
def test_an_old_run_goes_on_without_a_warning(trained: Path, run_cli: Callable[..., Any]) -> None:
    folder = trained.parent / "run"
    restored = restore(folder, base=False, warn=pytest.fail)
    _, _, frozen = trees.split(restored.model, "qlora")
    found = manifest.read(folder)["base_hash"]
    rewrite(folder, base_sha256=trees.sha256(frozen))
    check_base(folder, restored)
    ended = run_cli("evaluate", folder)
    assert ended.code == 0
    assert "warning" not in ended.err
    ended = run_cli("train", trained, "--resume", "--train.steps=5")
    assert ended.code == 0, ended.err
    assert "resumed from step 4" in ended.err
    assert CHANGED not in ended.err
    told = manifest.read(folder)
    assert told["base_hash"] == found
    assert "base_sha256" not in told
    assert told["earlier"][-1]["base_sha256"] == trees.sha256(frozen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hashes", [{"base_sha256": "ab" * 32}, {"base_hash": "2:" + "ab" * 32}], ids=["1", "2"]
)
def test_other_weights_are_found_in_both_versions(
    trained: Path, run_cli: Callable[..., Any], hashes: dict[str, str]
) -> None:
    folder = trained.parent / "run"
    rewrite(folder, **hashes)
    before = manifest.base_hash(hashes)
    assert before is not None
    with pytest.raises(UserError, match=before):
        check_base(folder, restore(folder, base=False, warn=pytest.fail))
    shutil.rmtree(folder / "adapter")  # the run then exports again, and loads the model
    ended = run_cli("train", trained, "--resume", "--train.steps=5")
    assert ended.code == 0, ended.err
    assert CHANGED in ended.err
    assert f"{before} then" in ended.err.replace("\n", "")
