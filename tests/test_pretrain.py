"""Pretrains a model from scratch by the command line; its folder loads like any other."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.formats.huggingface import open_folder
from qlora_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow

PRETRAIN = {
    "method": "full",
    "model__path": "from-scratch",
    "model__storage_dtype": "float32",
    "model__remat": "none",
    "pretrain__vocab_size": 300,
    "pretrain__hidden_size": 32,
    "pretrain__intermediate_size": 64,
    "pretrain__layers": 2,
    "pretrain__heads": 2,
    "pretrain__positions": 128,
    "optimizer__learning_rate": 0.01,
    "train__steps": 6,
    "lora": None,
}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    ended = run_cli("pretrain", write_config(folder, **PRETRAIN))
    assert ended.code == 0, ended.err
    assert "model/" in ended.out
    assert "adapter/" not in ended.out
    return folder / "run"


def losses(folder: Path) -> list[float]:
    return [r["eval/loss"] for r in read_metrics(folder / "metrics.jsonl") if "eval/loss" in r]


def test_it_learns(run: Path) -> None:
    first, *_, last = losses(run)
    assert first == pytest.approx(math.log(300), abs=0.05)
    assert last < first - 0.5


def test_the_folder_is_the_model_that_was_trained(
    run: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path, model__path=str(run / "model"), method="lora")
    for setting in ([], ["--model.storage_dtype=float32"]):
        ended = run_cli("evaluate", config, "--json", *setting)
        assert ended.code == 0, ended.err
    assert json.loads(ended.out)["loss"] == pytest.approx(losses(run)[-1], abs=2e-6)


def test_a_run_directory_is_evaluated_like_any_other(
    run: Path, run_cli: Callable[..., Any]
) -> None:
    ended = run_cli("evaluate", run, "--json")
    assert json.loads(ended.out)["loss"] == pytest.approx(losses(run)[-1], abs=1e-12)


def test_a_run_resumes(
    run: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    """A run that resumes from an earlier checkpoint ends with the same weights."""
    import shutil

    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    ended = run_cli("pretrain", write_config(tmp_path, **PRETRAIN), "--resume")
    assert ended.code == 0, ended.err
    assert "resumed from step 4" in ended.err
    before, after = open_folder(run / "model"), open_folder(tmp_path / "run" / "model")
    for name in before.names():
        np.testing.assert_array_equal(after.read(name), before.read(name))


def test_a_tokenizer_of_another_model(
    run: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path, **PRETRAIN, pretrain__tokenizer=str(run / "model"))
    ended = run_cli("train", config, "--pretrain.vocab_size=270")
    assert ended.code == 2
    assert re.search(r"pretrain.vocab_size 270: .* has ids up to \d+; give \d+ or more", ended.err)
    assert run_cli("train", config, "--train.steps=1").code == 0
    ours, theirs = (f / "model" / "tokenizer.json" for f in (tmp_path / "run", run))
    assert json.loads(ours.read_text())["model"] == json.loads(theirs.read_text())["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "qlora"}, "method qlora: a model from-scratch has nothing to freeze"),
        ({"model__path": "some/folder/there"}, "pretrain trains a new model; set it to"),
        ({"pretrain__heads": 3}, "3 heads do not divide hidden_size 32"),
        ({"pretrain__vocab_size": 200}, "give 259 or more"),
        ({"pretrain__tokenizer": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_bad_input(
    changes: dict[str, Any],
    message: str,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    ended = run_cli("pretrain", write_config(tmp_path, **PRETRAIN | changes))
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "run").exists()
