"""From a config to a run directory and back, through the command line."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ruamel.yaml import YAML
from small_gguf import write_gguf

from qlora_jax.config import digest
from qlora_jax.formats import peft
from qlora_jax.models import fingerprint
from qlora_jax.runtime import manifest
from qlora_jax.train import rundir
from qlora_jax.train.metrics import read_metrics
from qlora_jax.train.restore import restore

QUICK = [
    pytest.param(method, marks=[pytest.mark.quick, pytest.mark.slow]) for method in ("lora", "full")
]
PROMPT = "What does copytree 0 do?"
RATES = {"qlora": 0.02, "lora": 0.02, "full": 0.003}
LISTED = {
    ".lock",
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "checkpoints",
    "samples.md",
    "report.md",
    "loss_curve.png",
    "tensorboard",
}


class Run(NamedTuple):
    """A finished run: its directory, its method, the output of `--json`, and stderr."""

    folder: Path
    method: str
    json: dict[str, Any]
    err: str

    def losses(self) -> dict[int, float]:
        rows = read_metrics(self.folder / "metrics.jsonl")
        return {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}


@pytest.fixture(scope="module", params=["qlora", *QUICK])
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
) -> Run:
    """One run of each method, of 60 steps."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(
        folder,
        method=request.param,
        optimizer__learning_rate=RATES[request.param],
        train__eval_every=20,
        train__save_every=25,
        train__samples=1,
    )
    ended = run_cli("train", config, "--json", "--train.steps=60", "--lora.alpha", "8")
    assert ended.code == 0, ended.err
    return Run(folder / "run", request.param, json.loads(ended.out), ended.err)


def test_a_run_directory_holds_what_it_should(run: Run) -> None:
    expected = LISTED | ({"adapter"} if run.method != "full" else set())
    assert {path.name for path in run.folder.iterdir()} == expected
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {"50", "60"}
    assert (run.folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert PROMPT in (run.folder / "samples.md").read_text("utf-8")
    report = (run.folder / "report.md").read_text("utf-8")
    assert f"{run.json['eval_after']:.4f}" in report


def test_the_loss_falls_below_what_needs_no_context(run: Run, chats: Path) -> None:
    losses = run.losses()
    assert list(losses) == [0, 20, 40, 60]
    assert losses[0] == run.json["eval_before"] == pytest.approx(math.log(256), abs=0.2)
    assert losses[60] < losses[40] < losses[20] < losses[0]
    # A model that knows only the token frequencies cannot have a loss below their entropy.
    rows = [json.loads(line)["messages"] for line in chats.read_text("utf-8").splitlines()]
    counts = Counter(token for row in rows for token in (*row[-1]["content"], "<|im_end|>"))
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert losses[60] == run.json["eval_after"] < entropy


def test_every_step_is_logged_once_and_each_evaluation_once(run: Run) -> None:
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 61))
    assert len([row for row in rows if "eval/loss" in row]) == 4


def test_progress_goes_to_stderr_and_tells_what_runs(run: Run) -> None:
    for text in ("24 held out", "trainable: ", "held-out loss before", "60/60"):
        assert text in run.err
    assert ("base unchanged: hash 2:" in run.err) == (run.method != "full")


@pytest.mark.parametrize(("flags", "step"), [((), 60), (("--base",), 0)], ids=["after", "before"])
def test_evaluate_gives_the_loss_that_was_logged(
    run: Run, run_cli: Callable[..., Any], flags: tuple[str, ...], step: int
) -> None:
    ended = run_cli("evaluate", run.folder, "--json", *flags)
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["step"] == step
    assert result["loss"] == pytest.approx(run.losses()[step], abs=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == run.json["eval_tokens"]


def test_generate_answers_as_the_samples_do(run: Run, run_cli: Callable[..., Any]) -> None:
    answers = {}
    for flags in ((), ("--base",)):
        ended = run_cli(
            "generate", run.folder, "--json", "--prompt", PROMPT, "--max-new-tokens", "24", *flags
        )
        assert ended.code == 0, ended.err
        (entry,) = json.loads(ended.out)
        assert entry["prompt"] == PROMPT
        answers[bool(flags)] = entry["answer"]
    (sample,) = run.json["samples"]
    assert answers == {False: sample["after"], True: sample["before"]}
    assert answers[False] != answers[True]


def test_the_config_holds_the_overrides_and_the_defaults(run: Run) -> None:
    tree = YAML(typ="safe").load((run.folder / "config.yaml").read_text("utf-8"))
    assert (tree["train"]["steps"], tree["lora"]["alpha"], tree["method"]) == (60, 8, run.method)
    assert tree["optimizer"]["beta2"] == 0.999


def test_the_manifest_tells_what_ran(run: Run) -> None:
    told = manifest.read(run.folder)
    assert told["command"].startswith("qlora-jax train /")
    assert told["finished"] >= told["started"]
    assert told["config_sha256"] == digest(rundir.open_run(run.folder))
    assert told["results"]["eval_after"] == run.json["eval_after"]
    assert told["results"]["steps"] == 60
    assert (told["codebook_sha256"] is not None) == (run.method == "qlora")
    assert told["versions"]["jax"]


def test_the_manifests_hash_is_that_of_the_base(run: Run) -> None:
    restored = restore(run.folder, base=True, warn=print)
    base = fingerprint.base_hash(restored.model, run.method)
    assert manifest.read(run.folder)["base_hash"] == base
    assert run.json["base_hash"] == ("" if run.method == "full" else base)


def test_the_adapter_folder_holds_the_trained_adapter(run: Run) -> None:
    if run.method == "full":
        assert not (run.folder / "adapter").exists()
        return
    adapters = peft.read_adapter(run.folder / "adapter").adapters
    assert len(adapters) == 3 * 7
    model = restore(run.folder, base=False, warn=print).model
    for path, linear, i in model.walk():
        adapter = adapters[path]
        np.testing.assert_array_equal(adapter.a, linear.adapter.a.get_value()[i])
        np.testing.assert_array_equal(adapter.b, linear.adapter.b.get_value()[i])
        assert adapter.a.shape[1] == 3
        assert np.abs(adapter.b).max() > 0


def test_the_models_files_are_left_alone(run: Run, tiny_model: Path) -> None:
    golden = Path(__file__).parent / "golden" / "models" / "llama" / "model.safetensors"
    digests = [
        hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (golden, tiny_model / "model.safetensors")
    ]
    assert digests[0] == digests[1]


def test_results_go_to_stdout_and_the_rest_to_stderr(
    tmp_path: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any]
) -> None:
    ended = run_cli("train", write_config(tmp_path, train__samples=1))
    assert ended.code == 0, ended.err
    folder = tmp_path / "run"
    assert ended.out.splitlines()[-1].startswith(f"run directory: {folder} ")
    assert ended.out.splitlines()[-2] == "exported: step 4 of 4, the last one"
    assert ended.out.splitlines()[-3].startswith("held-out loss: 5.")
    assert "before" in ended.out
    assert "after" in ended.out
    assert "trainable" not in ended.out
    assert "run directory" not in ended.err
    ended = run_cli("evaluate", folder)
    assert ended.out.startswith("step 4, ")
    assert ended.out.count("\n") == 1


def test_a_config_is_evaluated_without_a_run(
    tmp_path: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any]
) -> None:
    config = write_config(tmp_path, data__eval_source=None)
    ended = run_cli("evaluate", config, "--data.eval_fraction=0.4", "--json")
    result = json.loads(ended.out)
    assert result["step"] == 0
    assert result["split"].endswith("40% held out by text")
    assert result["loss"] == pytest.approx(math.log(256), abs=0.2)
    assert not (tmp_path / "run").exists()


def test_preview_shows_marked_examples_and_writes_nothing(
    tmp_path: Path, write_config: Callable[..., Path], run_cli: Callable[..., Any]
) -> None:
    ended = run_cli("train", write_config(tmp_path), "--preview", "2")
    assert ended.code == 0, ended.err
    assert "example 2: " in ended.out
    assert "example 3: " not in ended.out
    answer = ended.out.replace("\n", "")
    assert "⟦copytree is number 0.<|im_end|>" in answer
    assert answer.count("⟧") == answer.count("⟦") >= 2
    assert not (tmp_path / "run").exists()


def test_a_base_that_changes_in_training_is_our_fault(
    tmp_path: Path,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashes = iter(["before", "after"])
    monkeypatch.setattr(fingerprint, "base_hash", lambda model, method: next(hashes))
    ended = run_cli("train", write_config(tmp_path, train__steps=1))
    assert ended.code == 1
    assert "the frozen base changed" in ended.message
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_a_gguf_file_trains_as_the_folder_it_was_made_from(
    tmp_path: Path,
    tiny_model: Path,
    byte_vocabulary: tuple[tuple[str, ...], str],
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model, *byte_vocabulary)
    results = []
    for model in (tiny_model, path):
        config = write_config(tmp_path, model__path=str(model))
        ended = run_cli("train", config, f"--output={tmp_path / model.name}-run", "--json")
        assert ended.code == 0, ended.err
        results.append(json.loads(ended.out))
    for name in ("eval_before", "eval_after"):
        assert results[1][name] == pytest.approx(results[0][name], abs=1e-6)
    assert results[1]["eval_after"] < results[1]["eval_before"]
