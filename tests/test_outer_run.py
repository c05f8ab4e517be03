"""Runs that adapt head and embedding: exact resumption, and the commands on such runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

TARGETS = ["q_proj", "lm_head", "embed_tokens"]
PROMPT = "What does rmtree do?"


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_config, run_cli) -> Path:
    """A finished run of four steps, with a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("outer")
    config = write_config(
        folder,
        lora__target_modules=TARGETS,
        lora__dropout=0.1,
        optimizer__moments="int8",
        optimizer__offload="host",
        train__gradient_accumulation=2,
        train__save_every=2,
    )
    ended = run_cli("train", config)
    assert ended.code == 0, ended.err
    return folder / "run"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_every_matrix_has_moved(run):
    found = tensors(run)
    outer = {key.removeprefix("base_model.model.") for key in found if ".layers." not in key}
    assert outer == {
        "lm_head.lora_A.weight",
        "lm_head.lora_B.weight",
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
    }
    assert all(x.any() for x in found.values())


def test_a_resumed_run_ends_with_the_same_bytes(run, tmp_path, run_cli, write_config):
    again = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / "4")
    config = tmp_path / "config.yaml"
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config.write_text(text.replace(str(run), str(again)), encoding="utf-8")
    ended = run_cli("train", config, "--resume")
    assert ended.code == 0, ended.err
    assert "resumed from step 2" in ended.err
    whole, resumed = tensors(run), tensors(again)
    assert whole.keys() == resumed.keys()
    for key, x in whole.items():
        np.testing.assert_array_equal(resumed[key], x, err_msg=key)


def loss(ended) -> float:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["loss"]


def test_evaluating_going_on_and_merging(run, tmp_path, run_cli, write_config):
    live = loss(run_cli("evaluate", run, "--json"))
    assert live < loss(run_cli("evaluate", run, "--base", "--json")) - 1e-3
    # a run from the exported adapter starts with the final loss of the first run
    config = write_config(
        tmp_path, lora__from_adapter=str(run / "adapter"), lora__rank=None, lora__alpha=None
    )
    ended = run_cli("train", config, "--train.steps=1", "--optimizer.learning_rate=1e-12")
    assert ended.code == 0, ended.err
    assert loss(run_cli("evaluate", tmp_path / "run", "--json")) == pytest.approx(live, abs=1e-4)
    before, after = tensors(run), tensors(tmp_path / "run")
    assert before.keys() == after.keys()
    for key, x in before.items():
        np.testing.assert_allclose(after[key], x, atol=1e-6, err_msg=key)
    ended = run_cli("merge", run, tmp_path / "merged", "--to", "float32")
    assert ended.code == 0, ended.err
    config = write_config(
        tmp_path / "merged", model__path=str(tmp_path / "merged"), lora__target_modules=["q_proj"]
    )
    ended = run_cli(
        "train",
        config,
        f"--output={tmp_path / 'other'}",
        "--method=lora",
        "--train.steps=1",
        "--model.storage_dtype=float32",  # dtype of the merged weights; bfloat16 would round
    )
    assert ended.code == 0, ended.err
    merged = loss(run_cli("evaluate", tmp_path / "other", "--base", "--json"))
    assert merged == pytest.approx(live, abs=1e-4)


def test_generate_takes_such_an_adapter_and_serve_tells_why_not(run, tmp_path, run_cli, tiny_model):
    asked = ["--prompt", PROMPT, "--max-new-tokens", "8", "--json"]
    own = run_cli("generate", run, *asked)
    assert own.code == 0, own.err
    named = run_cli("generate", run, "--adapter", f"mine={run}", "--base", *asked)
    assert named.code == 0, named.err
    answers = {row["adapter"]: row["answer"] for row in json.loads(named.out)}
    assert answers["mine"] == json.loads(own.out)[0]["answer"]
    base = run_cli("generate", run, "--base", *asked)
    assert answers[None] == json.loads(base.out)[0]["answer"]
    ended = run_cli("serve", tiny_model, "--port=0", "--adapter", f"x={run}")
    assert ended.code == 2
    assert f"--adapter x: {run / 'adapter'}: an adapter of" in ended.message
    assert "merge it into the model" in ended.message
    summed = run_cli("combine", tmp_path / "sum", "--adapter", f"1={run}", "--adapter", f"-1={run}")
    assert summed.code == 0, summed.err
    added = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    a, b = (added[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    np.testing.assert_allclose(b @ a, 0, atol=1e-6)
