"""QloraJaxLM in the real lm_eval harness; skipped without lm_eval (the harness extra)."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the harness extra")

from qlora_jax.evaluate.harness import QloraJaxLM  # noqa: E402
from qlora_jax.evaluate.score import Pair, score  # noqa: E402
from qlora_jax.runtime.errors import UserError  # noqa: E402

ROWS = [
    {"question": "What is hot?", "choices": ["ice", "the sun"], "answer": 1},
    {"question": "2+2?", "choices": ["4", "five"], "answer": 0},
    {"question": "Capital of France?", "choices": ["Paris", "Rome"], "answer": 0},
]
MODULE = (sys.executable, "-m", "qlora_jax.evaluate.harness")
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["~"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory, write_config):
    return str(write_config(tmp_path_factory.mktemp("harness"), method="lora"))


@pytest.fixture(scope="module")
def model(config):
    return QloraJaxLM(config=config, batch_size=2, device="cpu", max_batch_size=None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    for name, task in TASKS.items():
        head = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
            "num_fewshot": 0,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(head | task))
    return folder


@pytest.fixture(scope="module")
def results(config, tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="qlora_jax",
        model_args=f"config={config}",
        tasks=list(TASKS),
        batch_size=2,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )


def own(model, context, continuation):
    ids = [model.tok_encode(text) for text in (context, continuation)]
    options = {"dtype": "float32", "pad_id": 0, "batch_size": 1}
    return score(model.restored.model, [Pair(*ids)], **options)[0].log_likelihood


def test_multiple_choice(model, results):
    right = []
    for row in ROWS:
        values = [own(model, f"{row['question']}\nAnswer:", f" {c}") for c in row["choices"]]
        right.append(int(np.argmax(values)) == row["answer"])
    assert results["results"]["choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_rolling(model, results):
    end = "<|endoftext|>"
    total = sum(own(model, end, row["question"]) for row in ROWS)
    size = sum(len(row["question"].encode()) for row in ROWS)
    found = results["results"]["rolling"]["byte_perplexity,none"]
    assert found == pytest.approx(math.exp(-total / size), rel=1e-5)


def test_generation_is_the_commands_own(model, results):
    from qlora_jax.models.generate import generate

    for sample, row in zip(results["samples"]["writing"], ROWS):
        text = model.restored.tokenizer
        new = generate(
            model.restored.model,
            [text.encode(row["question"])],
            max_new_tokens=12,
            stop_ids=text.stop_ids,
            pad_id=text.pad_id,
            dtype="float32",
        )[0]
        assert sample["resps"][0][0] == text.decode(new).partition("~")[0]


def test_long_contexts_lose_their_beginning(config, model):
    short = QloraJaxLM(config=config, max_length=20)
    context, answer = "x" * 15 + "y" * 40, " yes"
    found = short._loglikelihood_tokens(
        [((context, answer), short.tok_encode(context), short.tok_encode(answer))]
    )
    assert found[0][0] == pytest.approx(own(model, context[-17:], answer), abs=1e-4)


def test_chat_template(model):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer"}]
    begun = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(turns[:1]) == begun
    assert model.apply_chat_template(turns, add_generation_prompt=False) == f"{begun}The answer"
    assert model.chat_template(True)
    assert model.chat_template(False) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give run=DIR or config=FILE"),
        ({"run": "a", "config": "b"}, "one of them"),
        ({"run": "nowhere"}, "run=nowhere is not a run directory"),
        ({"run": "a", "pretrained": "b"}, "pretrained is not known"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        QloraJaxLM(**arguments)


def test_the_harness_command_line_knows_it(tasks):
    arguments = ["--model", "qlora_jax", "--model_args", "run=nowhere", "--tasks", "choice"]
    done = subprocess.run(
        [*MODULE, *arguments, "--include_path", str(tasks)],
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert last == "qlora_jax: model_args: run=nowhere is not a run directory"
