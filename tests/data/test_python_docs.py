import collections
import inspect
import itertools
import shutil

import pytest

from qlora_jax.data.builtin import python_docs
from qlora_jax.data.records import Chat, Prompt, Text


@pytest.fixture(scope="module")
def docs():
    return python_docs.documented()


@pytest.fixture(scope="module")
def chats():
    return python_docs.records()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shutil.copytree", shutil.copytree),
        ("collections.Counter.most_common", collections.Counter.most_common),
        ("itertools.accumulate", itertools.accumulate),
        ("str.split", str.split),
        ("sorted", sorted),
    ],
)
def test_the_documentation_is_what_inspect_finds(docs, name, value):
    assert docs[name] == inspect.getdoc(value)


def test_only_public_names_of_the_standard_library(docs):
    parts = [name.split(".") for name in docs]
    assert not any(p.startswith("_") for name in parts for p in name)
    assert not {name[0] for name in parts} & {"test", "idlelib", "pytest", "numpy", "this"}
    assert 3000 < len(docs) < 9000


def test_questions_and_answers(chats, docs):
    answers = {c.messages[0]["content"]: c.messages[1]["content"] for c in chats}
    assert len(answers) == len(chats) > 3000
    copytree = answers["What does `shutil.copytree` do?"]
    assert copytree.startswith("Recursively copy a directory tree")
    assert all(20 <= len(a) <= 600 for a in answers.values())
    assert len(set(answers.values())) == len(answers)


def test_order_is_fixed_and_mixed(chats):
    assert python_docs.records() == chats
    modules = {c.where.split()[1].split(".")[0] for c in chats[:100]}
    assert len(modules) > 20


def test_other_formats(chats):
    prompts = python_docs.records("prompt")
    assert all(isinstance(p, Prompt) for p in prompts)
    assert [p.completion for p in prompts] == [c.messages[1]["content"] for c in chats]
    texts = python_docs.records("text")
    assert all(isinstance(t, Text) for t in texts)
    assert isinstance(chats[0], Chat)


def test_what_is_left_out_is_counted(docs):
    dropped = collections.Counter()
    kept = python_docs.records("auto", dropped)
    assert len(kept) + dropped.total() == len(docs)
    assert dropped["answer occurs twice"] > 0


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return a.\n\nMore\nwords.\n\n>>> f()\n1\n\nEnd.", "Return a.\nMore words."),
        ("f(x, y) -> int\n\nAdd   them.", "Add them."),
        ("f(x)\nAdd them.", "Add them."),
        ("Add them.\n\nArguments:\n\n- x\n- y", "Add them."),
        ("Add them.\n\n    indented", "Add them."),
        ("- a list", ""),
        ("One.\n\n" + "x" * 600, "One."),
        ("f(x)", ""),
    ],
)
def test_answer_is_the_opening_prose(doc, expected):
    assert python_docs.answer(doc) == expected
