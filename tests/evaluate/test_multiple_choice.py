import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import config as configs
from qlora_jax.evaluate import multiple_choice, questions
from qlora_jax.evaluate.multiple_choice import Z95, evaluate, prompt, wilson
from qlora_jax.evaluate.questions import Question
from qlora_jax.train.restore import from_config

pytestmark = pytest.mark.quick

SUN = Question("What is hot?", ("ice", "the sun", "snow", "a fjord"), 1, "hard_physics")
SOLVED = [Question(f"Is {i} even?", ("yes", "no"), i % 2, "hard_physics") for i in range(5)]
ASKED = [
    SUN,
    Question("2+2?", ("3", "4", "22"), 1, "maths"),
    Question("1+1?", ("2", "11"), 0, "maths"),
    Question("Pick.", ("abc", "a", "xyzzy plugh", "no"), 3, "maths"),
]
WIDTH = 512


@pytest.fixture(scope="module")
def restored(tiny_model):
    tree = {
        "model": {
            "path": str(tiny_model),
            "compute_dtype": "float32",
            "storage_dtype": "float32",
        },
        "data": {"source": "none", "sequence_length": 64},
        "output": "run",
        "method": "lora",
    }
    return from_config(configs.from_tree(tree, "test"), pytest.fail)


@pytest.fixture(scope="module")
def log_likelihood(restored):
    """Computes the log-likelihood of a continuation, byte by byte, from all logits in float64."""
    model = restored.model

    @jax.jit
    def padded(tokens):
        places = jnp.arange(WIDTH)[None]
        hidden = model.hidden(tokens, jnp.ones_like(tokens), places, dtype=jnp.float32)
        return model.logits(hidden)[0]

    def run(context, continuation):
        ids = restored.tokenizer.encode(context + continuation)
        n = len(continuation)
        tokens = jnp.asarray([[*ids, *[0] * (WIDTH - len(ids))]], jnp.int32)
        logits = np.asarray(padded(tokens), np.float64)[len(ids) - n - 1 : len(ids) - 1]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logs[np.arange(n), ids[-n:]].sum()

    return run


def run(restored, asked, examples=(), **more):
    options = {"shots": 0, "by": "letter", "metric": "m/test/accuracy", "batch_size": 4} | more
    return evaluate(
        restored.model,
        restored.tokenizer,
        asked,
        questions.by_subject(examples),
        dtype=jnp.dtype("float32"),
        **options,
    )


def test_the_prompt_is_mmlus():
    assert prompt(SUN, SOLVED[:2], "letter") == (
        "The following are multiple choice questions (with answers) about hard physics.\n\n"
        "Is 0 even?\nA. yes\nB. no\nAnswer: A\n\n"
        "Is 1 even?\nA. yes\nB. no\nAnswer: B\n\n"
        "What is hot?\nA. ice\nB. the sun\nC. snow\nD. a fjord\nAnswer:"
    )
    assert prompt(Question("Q?", ("a", "b"), 0), [], "text") == (
        "The following are multiple choice questions (with answers).\n\nQ?\nAnswer:"
    )


def test_letters_by_hand(restored, log_likelihood):
    right = []
    for question in ASKED:
        context = prompt(question, [], "letter")
        letters = "ABCD"[: len(question.choices)]
        values = [log_likelihood(context, f" {letter}") for letter in letters]
        assert np.diff(sorted(values)).min() > 1e-3  # no two letters so close that rounding decides
        right.append(int(np.argmax(values)) == question.answer)
    result = run(restored, ASKED)
    assert (result.total.correct, result.total.count) == (sum(right), 4)
    assert result.subjects["hard_physics"].correct == right[0]
    assert result.subjects["maths"].correct == sum(right[1:])
    assert result.macro == pytest.approx((right[0] + sum(right[1:]) / 3) / 2)


def test_texts_by_hand_and_by_length(restored, log_likelihood):
    """Makes each choice the answer in turn; only the best by log-likelihood / length is correct."""
    for question in ASKED:
        context = prompt(question, [], "text")
        values = [log_likelihood(context, f" {c}") / len(c) for c in question.choices]
        best = int(np.argmax(values))
        for answer in range(len(question.choices)):
            asked = [Question(question.question, question.choices, answer, question.subject)]
            assert run(restored, asked, by="text").total.correct == (answer == best)


def test_examples_that_do_not_fit_are_left_out(restored, log_likelihood):
    limit = restored.model.config.max_positions
    question = Question("?" * 300, ("a", "b"), 0, "hard_physics")
    fit = max(n for n in range(6) if len(prompt(question, SOLVED[:n], "letter")) + 1 <= limit)
    assert fit < 5
    context = prompt(question, SOLVED[:fit], "letter")
    best = int(np.argmax([log_likelihood(context, f" {x}") for x in "AB"]))
    result = run(restored, [question], SOLVED, shots=5)
    assert result.total.correct == (best == 0)
    assert (result.shortened, result.cut) == (1, 0)
    assert run(restored, [question], SOLVED, shots=fit).shortened == 0
    long = Question("?" * 3 * limit, ("a", "b"), 0)
    assert run(restored, [long]).cut == 1


@pytest.mark.parametrize(("correct", "count"), [(0, 7), (3, 10), (8, 10), (50, 100), (7, 7)])
def test_wilsons_ends_solve_the_equation(correct, count):
    share = correct / count
    low, high = wilson(correct, count)
    for p in (low, high):
        assert (p - share) ** 2 == pytest.approx(Z95**2 * p * (1 - p) / count, abs=1e-12)
    assert low <= share <= high


def test_wilson_known_values():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson(0, 20)[1] == pytest.approx(Z95**2 / (20 + Z95**2))
    assert wilson(0, 20)[0] == 0


@pytest.mark.slow
def test_the_command_line(tiny_model, tmp_path, write_config, run_cli, restored):
    config = write_config(tmp_path, method="lora", model__storage_dtype="float32")
    for split, rows in (("test", ASKED[1:]), ("dev", SOLVED)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        lines = [
            f"{q.question},{','.join([*q.choices, 'w', 'x'][:4])},{'ABCD'[q.answer]}" for q in rows
        ]
        path = tmp_path / "mmlu" / split / f"maths_{split}.csv"
        path.write_text("\n".join(lines) + "\n")
    data = str(tmp_path / "mmlu")
    ended = run_cli("evaluate", config, "--multiple-choice", data, "--shots", "1", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    asked, examples = questions.read(data, "test"), questions.read(data, "dev")
    assert [q.subject for q in asked] == ["maths"] * 3
    expected = run(restored, asked, examples, shots=1)
    assert found["metric"] == "mmlu/test/accuracy"
    assert found["total"]["correct"] == expected.total.correct
    assert found["subjects"].keys() == {"maths"}
    table = run_cli("evaluate", config, "--multiple-choice", data, "--by", "text").out
    assert "maths" in table
    assert "mean of subjects" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "5"], "--shots is only valid with --multiple-choice"),
        (["--multiple-choice", "no.jsonl"], "no.jsonl: no such file"),
        (["--multiple-choice", "{file}", "--shots", "2"], "is one file; give --examples"),
        (["--multiple-choice", "{folder}", "--split", "val"], "no val/*_val.csv in it"),
        (["--multiple-choice", "{file}", "--shots", "9"], "--shots"),
    ],
)
def test_bad_input(arguments, message, tmp_path, write_config, run_cli):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": "B"}) + "\n")
    arguments = [a.format(file=file, folder=tmp_path) for a in arguments]
    ended = run_cli("evaluate", write_config(tmp_path), *arguments)
    assert ended.code == 2
    assert message in ended.message


def test_a_tie_goes_to_the_first():
    assert multiple_choice._best([-1.0, -0.5, -0.5]) == 1
