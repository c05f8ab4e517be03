"""Tests `qlora-jax chat`, which reads lines and prints answers."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from qlora_jax import cli
from qlora_jax.commands import chat
from qlora_jax.models.adapters import set_adapter
from qlora_jax.models.decoder import detach
from qlora_jax.models.generate import generate
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.base import open_base, read_named
from qlora_jax.serve.conversation import TimedAnswer

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "tests" / "golden" / "models" / "llama"


class Echo:
    """A fake conversation whose answers repeat its state and the question."""

    def __init__(self):
        self.system, self.turns = None, 0

    def reset(self):
        self.turns = 0

    def ask(self, question, model, on_text, stopped=lambda: False):
        if question == "too long":
            raise UserError("the conversation has no room; /reset begins a new one")
        self.turns += 1
        text = f"{model} {self.system} {self.turns} {question}"
        on_text(text)
        return TimedAnswer(text, "full" if question == "fill" else "stop", 1, 2, 0.1, 0.2)


@pytest.fixture
def type_lines(monkeypatch):
    """Returns a function that puts lines on stdin."""

    def put(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return put


@pytest.fixture
def echo(monkeypatch, type_lines, run_cli):
    """Returns a function that runs the chat over an `Echo` with the given lines on stdin."""

    def run(*lines, options=()):
        type_lines(*lines)
        monkeypatch.setattr(
            chat,
            "_opened",
            lambda given: chat._Chat(
                Echo(), ["base", "one"], "one", {"most": 5, "length": 9}, given.json
            ),
        )
        return run_cli("chat", "model", *options)

    return run


def test_only_answers_go_to_stdout(echo):
    lines = ["Hi", "", "/adapter", "/adapter base", "/system Be brief.", "/system", "//x", "/help"]
    ended = echo(*lines, "/reset", '/system ""', "fill", "/exit", "never asked")
    assert ended.code == 0
    assert ended.out == "one None 1 Hi\nbase Be brief. 2 /x\nbase None 1 fill\n"
    assert ended.err.splitlines() == [
        "adapters: base, [one]",
        "base answers from here on",
        "system turn: Be brief.",
        "system turn: Be brief.",
        *chat.HELP.splitlines(),
        "a new conversation begins",
        "system turn: none",
        "(the answer was cut: the conversation fills the model's 9 positions; /reset begins a new "
        "one)",
    ]


def test_lines_without_an_answer_are_told_and_counted(echo):
    lines = ["/adapter two", "/reste", "too long", "Hi"]
    expected = [
        "/adapter two: no such adapter; there are base, [one]; start the chat with "
        "--adapter NAME=DIR for another adapter, or with --base for the base",
        "/reste: no such command; /help lists them, and //TEXT sends /TEXT to the model",
        "the conversation has no room; /reset begins a new one",
    ]
    ended = echo(*lines)
    assert (ended.code, ended.out) == (2, "one None 1 Hi\n")
    last = "qlora-jax: 3 of 4 lines got no answer; see the lines above for each"
    assert ended.err.splitlines() == [*expected, last]
    rows = [json.loads(line) for line in echo(*lines, options=["--json"]).out.splitlines()]
    assert rows[:3] == [{"prompt": q, "error": e} for q, e in zip(lines, expected)]
    assert rows[3] == {
        "prompt": "Hi",
        "adapter": "one",
        "answer": "one None 1 Hi",
        "finish": "stop",
        "prompt_tokens": 1,
        "tokens": 2,
        "first_s": 0.1,
        "seconds": 0.2,
    }


def test_a_line_that_is_no_text_is_refused(echo, monkeypatch, run_cli):
    echo()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n\xff\n"), "utf-8"))
    ended = run_cli("chat", "model")
    assert ended.code == 2
    assert "stdin: a line is not UTF-8; convert the text" in ended.message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["m", "--max-new-tokens=0"], "--max-new-tokens: must be a whole number of 1 or more"),
        (["m", "--adapter", "x"], "--adapter: must be NAME=DIR"),
        (["m", "--adapter", "a=b", "--adapter", "a=c"], "--adapter a=...: the name is given twice"),
        (["./none"], "./none: no such file or folder"),
    ],
)
def test_what_cannot_be_opened_is_one_line(run_cli, arguments, expected):
    ended = run_cli("chat", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.message.startswith("qlora-jax: ")
    assert expected in ended.message


@pytest.mark.slow
def test_a_model_without_turns_is_refused(run_cli, make_model, tmp_path):
    folder = make_model(tmp_path / "raw", template=None)
    ended = run_cli("chat", folder)
    assert ended.code == 2
    assert ended.message == (
        f"qlora-jax: {folder}: the tokenizer has no chat template, so it cannot chat; "
        "give an instruct model, or continue a text with: qlora-jax generate "
        f'{folder} --prompt "..."'
    )


PLAIN = ("--dtype=float32", "--bits=16")
QUESTIONS = ("What does rmtree do?", "And chr?", "Why?")


class Truth:
    """The reference: `generate` on the whole rendered conversation."""

    def __init__(self, path, text, adapters=(), most=12):
        self.base = open_base(str(path), bits=16, dtype="float32", warn=pytest.fail)
        self.text, self.most = text, most
        named = read_named({name: str(folder) for name, folder in dict(adapters).items()})
        self.adapters = {own.name: own.on(self.base.model) for own in named}

    def answer(self, messages, name=None, **settings):
        if name is None:
            detach(self.base.model)
        else:
            set_adapter(self.base.model, self.adapters[name])
        (ids,) = generate(
            self.base.model,
            [self.text.encode(self.text.render(messages, True))],
            max_new_tokens=self.most,
            stop_ids=self.text.stop_ids,
            pad_id=self.text.pad_id,
            dtype="float32",
            **settings,
        )
        return self.text.decode(ids)


def talk(messages, question, answer):
    return [
        *messages,
        {"role": "user", "content": question},
        *([] if answer is None else [{"role": "assistant", "content": answer}]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}])
def test_each_answer_is_generates_for_the_conversation(
    tiny_model, adapters, text, run_cli, type_lines, drawn
):
    lines = [QUESTIONS[0], "/adapter two", QUESTIONS[1], "/adapter base", QUESTIONS[2]]
    type_lines(*lines)
    given = [f"--adapter={name}={adapters[name]}" for name in ("one", "two")]
    options = [f"--{key.replace('_', '-')}={value}" for key, value in drawn.items()]
    asked = ["--system", "Be brief.", "--max-new-tokens", "12"]
    ended = run_cli("chat", tiny_model, *PLAIN, *given, *options, *asked, "--json")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in ended.out.splitlines()]
    truth = Truth(tiny_model, text, adapters)
    messages = [{"role": "system", "content": "Be brief."}]
    for row, question, name in zip(rows, QUESTIONS, ["one", "two", None], strict=True):
        expected = truth.answer(talk(messages, question, None), name, **drawn)
        assert (row["prompt"], row["adapter"]) == (question, name or "base")
        assert row["answer"] == expected
        messages = talk(messages, question, row["answer"])
    assert len({row["answer"] for row in rows}) == 3


@pytest.mark.slow
def test_switching_adapters_compiles_nothing(tiny_model, adapters, run_cli, monkeypatch):
    """Both conversations have the same length; the second has another adapter."""
    jax.clear_caches()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    given = [f"--adapter={name}={adapters[name]}" for name in ("one", "two")]
    counts = []

    class Lines(io.StringIO):
        def __next__(self):
            counts.append(len(compiled))
            return super().__next__()

    typed = "".join(f"{line}\n" for line in ("Hi?", "/reset", "/adapter two", "Hi?"))
    monkeypatch.setattr(sys, "stdin", Lines(typed))
    ended = run_cli("chat", tiny_model, *PLAIN, *given, "--max-new-tokens=9", "--json")
    assert ended.code == 0, ended.err
    first, second = (json.loads(line)["answer"] for line in ended.out.splitlines())
    assert first != second
    assert counts[1] > counts[0]
    assert counts[1:] == [counts[1]] * 4


class Interrupting(io.StringIO):
    """A stdout that sends SIGINT, as Ctrl-C does, after `after` characters."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def write(self, text):
        written = super().write(text)
        if self.after is not None and len(self.getvalue()) >= self.after:
            self.after = None
            os.kill(os.getpid(), signal.SIGINT)
        return written


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny_model, text, type_lines, monkeypatch):
    type_lines(*QUESTIONS[:2])
    out, err = Interrupting(5), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(["chat", str(tiny_model), *PLAIN, "--max-new-tokens=40"]) == 0
    truth = Truth(tiny_model, text, most=40)
    whole = truth.answer(talk([], QUESTIONS[0], None))
    partial, _, rest = out.getvalue().partition("\n")
    assert 5 <= len(partial) < len(whole)
    assert whole.startswith(partial)
    assert "(stopped; the text so far stays in the conversation)" in err.getvalue()
    second = truth.answer(talk(talk([], QUESTIONS[0], partial), QUESTIONS[1], None))
    assert rest == f"{second}\n"


@pytest.mark.slow
def test_a_conversation_that_is_full_offers_a_reset(tiny_model, run_cli, type_lines):
    type_lines("a" * 350, "b" * 200, "/reset", "c")
    ended = run_cli("chat", tiny_model, *PLAIN, "--max-new-tokens=8")
    assert ended.code == 2
    told = "conversation and answer together can have 512; enter /reset or write less"
    assert told in " ".join(ended.err.split())
    assert len(re.findall("the answer was cut at --max-new-tokens 8", ended.err)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora", "full", "dora", "pissa", "head"])
def test_a_runs_chat_begins_as_its_generate(
    tmp_path, write_config, run_cli, type_lines, method, adapters
):
    changes = {
        "dora": {"lora__variant": "dora", "method": "lora"},
        "pissa": {"lora__init": "pissa", "method": "lora"},
        "head": {"lora__target_modules": ["q_proj", "lm_head"]},
    }.get(method, {"method": method})
    config = write_config(
        tmp_path, train__steps=2, data__system_prompt="Be brief.", train__eval_every=0, **changes
    )
    ended = run_cli("train", config)
    assert ended.code == 0, ended.err
    run, length = tmp_path / "run", "--max-new-tokens=12"
    answers = {}
    for options in ([], ["--base"]):
        type_lines(QUESTIONS[0])
        said = run_cli("chat", run, length, *options, "--json")
        assert said.code == 0, said.err
        row = json.loads(said.out)
        ended = run_cli("generate", run, length, *options, "--prompt", QUESTIONS[0], "--json")
        assert row["answer"] == json.loads(ended.out)[0]["answer"]
        answers[row["adapter"]] = row["answer"]
    assert list(answers) == ["run", "base"]
    assert answers["run"] != answers["base"]
    type_lines("/adapter base", QUESTIONS[0])
    switched = run_cli("chat", run, length, "--json")
    row = json.loads(switched.out.splitlines()[-1])
    assert row["answer"] == answers["base" if method == "qlora" else "run"]
    assert switched.code == (0 if method == "qlora" else 2)
    type_lines(QUESTIONS[0], "/adapter run", QUESTIONS[0])
    beside = run_cli("chat", run, length, f"--adapter=one={adapters['one']}", "--json")
    assert json.loads(beside.out.splitlines()[0])["adapter"] == "one"
    assert ("cannot be used beside other adapters" in beside.err) == (
        method in ("dora", "pissa", "head")
    )
    refused = run_cli("chat", run, "--bits=16")
    assert refused.message.startswith(f"qlora-jax: --bits 16: {run} is a run directory and has")


@pytest.mark.slow
def test_at_a_terminal(tiny_model):
    """Checks prompt, pieces of an answer, Ctrl-C within an answer, and Ctrl-D."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "qlora_jax", "chat", str(tiny_model), *PLAIN]
    process = subprocess.Popen(
        [*command, "--max-new-tokens=400"],
        stdin=other,
        stdout=other,
        stderr=other,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(other)
    seen = ""

    def until(pattern):
        nonlocal seen
        deadline = time.monotonic() + 240
        while not re.search(pattern, seen, re.DOTALL):
            ready, _, _ = select.select([main], [], [], max(0, deadline - time.monotonic()))
            assert ready, seen
            seen += os.read(main, 4096).decode()
        seen = ""

    try:
        until(r"base answers; /help lists the commands.*> ")
        os.write(main, b"Hi?\n")
        until(r"Hi\?\r\n.*\S\S\S")
        process.send_signal(signal.SIGINT)
        until(r"\(stopped; the text so far.*> ")
        os.write(main, b"/adapter\n")
        until(r"adapters: \[base\].*> ")
        os.write(main, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
