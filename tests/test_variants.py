"""Whole runs with variants of LoRA, by the command line."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def first(tmp_path_factory, write_config: Callable[..., Path], run_cli: Callable[..., Any]):
    """Folder of a run with 4-bit DoRA, and its summary."""
    folder = tmp_path_factory.mktemp("dora")
    config = write_config(folder, lora__variant="dora", lora__target_modules=["q_proj", "up_proj"])
    ended = run_cli("train", config, "--json")
    assert ended.code == 0, ended.err
    return folder / "run", json.loads(ended.out)


def test_dora_is_trained_and_exported_in_pefts_format(first, run_cli, tmp_path):
    run, summary = first
    assert summary["eval_after"] < summary["eval_before"]
    tensors = load_file(run / "adapter" / WEIGHTS)
    assert sum("lora_magnitude_vector" in key for key in tensors) == 6
    ended = run_cli("export", run, tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["step"] == 4
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_a_run_goes_on_from_the_adapter_of_another(first, write_config, run_cli, tmp_path):
    run, summary = first
    adapter = run / "adapter"
    config = write_config(tmp_path, lora={"from_adapter": str(adapter)})
    ended = run_cli("train", config, "--json")
    assert ended.code == 0, ended.err
    second = json.loads(ended.out)
    assert second["eval_before"] == pytest.approx(summary["eval_after"], abs=1e-6)
    assert second["eval_after"] < second["eval_before"]
    described = json.loads((tmp_path / "run" / "manifest.json").read_text())
    digest = hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
    assert described["from_adapter_sha256"] == digest
    assert described["config"]["lora"]["variant"] == "dora"
    again = run_cli("evaluate", tmp_path / "run", "--json")
    assert json.loads(again.out)["loss"] == pytest.approx(second["eval_after"], abs=1e-6)
    before = run_cli("evaluate", tmp_path / "run", "--base", "--json")
    assert json.loads(before.out)["loss"] == pytest.approx(second["eval_before"], abs=1e-6)
    assert run_cli("generate", tmp_path / "run", "--prompt", "What?").code == 0
    # resuming the finished run changes nothing, because its config is equal
    assert run_cli("train", config, "--resume").code == 0


def test_a_start_from_the_weights_is_trained_resumed_and_exported(write_config, run_cli, tmp_path):
    config = write_config(
        tmp_path, lora__init="loftq", lora__loftq_iterations=2, lora__target_modules=["q_proj"]
    )
    ended = run_cli("train", config)
    assert ended.code == 0, ended.err
    assert "loftq: base and adapters differ from the pretrained weights by" in ended.err
    tensors = load_file(tmp_path / "run" / "adapter" / WEIGHTS)
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {6}
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    shutil.rmtree(stopped / "adapter")
    resumed = run_cli("train", config, f"--output={stopped}", "--resume")
    assert resumed.code == 0, resumed.err
    assert "resumed from step 2" in resumed.err
    ours, theirs = (f / "adapter" / WEIGHTS for f in (stopped, tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_full_fine_tuning_has_no_adapter_to_export(write_config, run_cli, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(write_config(tmp_path, method="full"), run / "config.yaml")
    ended = run_cli("export", run, tmp_path / "out")
    assert ended.code == 2
    assert "method full trains every weight" in ended.message


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting that cannot be used, and the text of its error message."""

    changes: dict[str, Any]
    says: str


@pytest.mark.parametrize(
    "case",
    [
        Case({"lora__variant": "vera"}, "lora.variant"),
        Case({"method": "lora", "lora__init": "loftq"}, "loftq"),
        Case({"lora__from_adapter": "nowhere"}, "nowhere: no such folder"),
    ],
    ids=lambda case: "-".join(case.changes),
)
def test_settings_that_cannot_be_used(case, write_config, run_cli, tmp_path):
    ended = run_cli("train", write_config(tmp_path, **case.changes))
    assert ended.code == 2
    assert case.says in ended.message
    assert not (tmp_path / "run").exists()
