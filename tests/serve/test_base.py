"""Tests models and runs as the base of adapters, through `generate`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.serve.base import own_adapter

pytestmark = pytest.mark.slow

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"
PROMPT = "What does rmtree do?"


@pytest.fixture
def run(tmp_path, write_config, adapters):
    """Makes a run directory with the files that a base needs: the config and the adapter."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write_config(folder, output=str(folder))
    shutil.copytree(adapters["one"], folder / "adapter")
    return folder


def test_a_run_brings_its_adapter_under_its_name(run, tiny_model, tmp_path, write_config):
    assert own_adapter(str(run)) == {"mine": str(run / "adapter")}
    assert own_adapter(str(tiny_model)) == {}
    full = tmp_path / "full"
    full.mkdir()
    write_config(full, method="full")
    assert own_adapter(str(full)) == {}


def test_generate_answers_under_each_adapter(run, adapters, run_cli, tiny_model):
    given = ["--adapter", f"mine={run}", "--adapter", f"two={adapters['two']}", "--base"]
    asked = ["--prompt", PROMPT, "--prompt", "And chr?", "--max-new-tokens", "12"]
    by_run = run_cli("generate", run, *given, *asked, "--json")
    assert by_run.code == 0, by_run.err
    rows = json.loads(by_run.out)
    assert [(r["prompt"], r["adapter"]) for r in rows] == [
        (prompt, name) for prompt in (PROMPT, "And chr?") for name in ("mine", "two", None)
    ]
    assert len({r["answer"] for r in rows}) > 3
    by_model = run_cli("generate", tiny_model, *given, *asked, "--dtype", "float32")
    expected = "".join(
        f"[{r['adapter'] or 'base'} | {r['prompt']}]\n{r['answer']}\n\n" for r in rows
    )
    assert by_model.out == expected


def test_a_plain_model_needs_no_adapter(run, adapters, run_cli, tiny_model):
    asked = ["--prompt", PROMPT, "--max-new-tokens", "12", "--json", "--system", "Be brief."]
    plain = run_cli("generate", tiny_model, *asked, "--dtype", "float32", "--bits", "16")
    assert plain.code == 0, plain.err
    given = ["--adapter", f"one={adapters['one']}", "--base", "--dtype", "float32", "--bits", "16"]
    rows = json.loads(run_cli("generate", tiny_model, *asked, *given).out)
    (answer,) = json.loads(plain.out)
    assert answer == {"prompt": PROMPT, "answer": rows[1]["answer"]}
    unlike = run_cli("generate", tiny_model, *asked[:-2], "--dtype", "float32", "--bits", "16")
    assert json.loads(unlike.out)[0]["answer"] != answer["answer"]


def test_how_a_run_is_held_is_the_runs_own(run, run_cli):
    for command in ("generate", "serve", "chat"):
        prompt = ["--prompt", "a"] if command == "generate" else []
        ended = run_cli(command, run, *prompt, "--dtype", "float16")
        assert ended.code == 2
        assert ended.message == (
            f"qlora-jax: --dtype float16: {run} is a run directory and has its own settings; leave "
            "--dtype out, or give the model itself"
        )


@pytest.mark.parametrize("kind", ["peft_dora", "peft_saved"])
def test_one_adapter_alone_may_be_of_any_kind(run_cli, adapters, tiny_model, kind):
    other = LLAMA / kind
    asked = ["--prompt", PROMPT, "--max-new-tokens", "12", "--dtype", "float32", "--bits", "16"]
    alone = run_cli("generate", tiny_model, "--adapter", f"x={other}", *asked)
    plain = run_cli("generate", tiny_model, "--adapter", f"x={adapters['one']}", *asked)
    assert alone.code == plain.code == 0, alone.err
    assert alone.out.startswith("[x]\n")
    assert alone.out != plain.out
    several = ["--adapter", f"x={other}", "--adapter", f"y={adapters['one']}"]
    refused = run_cli("generate", tiny_model, *several, *asked)
    assert refused.code == 2
    assert "--adapter x: " in refused.err
    assert "cannot be one of several adapters; merge it" in " ".join(refused.err.split())


def test_what_does_not_fit_is_refused_by_name(run_cli, adapters, tiny_model, tmp_path):
    other = shutil.copytree(adapters["one"], tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :100])
    save_file(tensors, other / "adapter_model.safetensors")
    for command in (["generate", tiny_model, "--prompt", "a"], ["serve", tiny_model, "--port=0"]):
        ended = run_cli(*command, "--adapter", f"x={other}")
        assert ended.code == 2
        assert ended.message == (
            f"qlora-jax: --adapter x: {other}: belongs to another model (llama); what does not "
            "fit: model.layers.1.mlp.down_proj (adapter [100, 64], model [128, 64])"
        )
