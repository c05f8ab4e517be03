import json

import datasets
import pytest

from qlora_jax.data import hub as hub_module
from qlora_jax.data import sources
from qlora_jax.data.records import Chat, Prompt
from qlora_jax.runtime.errors import UserError


@pytest.fixture
def jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(r) for r in rows))
        return str(path)

    return write


def rows(n):
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n)]


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: a split's rows, or the error it raises."""
    calls = []

    def serve(answer):
        def load(source, name, split):
            calls.append((source, name, split))
            if isinstance(answer, Exception):
                raise answer
            return datasets.Dataset.from_list(answer[split])

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(hub_module, "reachable", lambda source: True)
        return calls

    return serve


def test_a_file_is_split_by_text(jsonl, data_config):
    split = sources.read(data_config(jsonl(rows(50)), eval_fraction=0.2))
    assert all(isinstance(r, Prompt) for r in split.train + split.held_out)
    assert len(split.train) + len(split.held_out) == 50
    assert 0 < len(split.held_out) < 25
    assert split.dropped == {}
    assert split.train[0].where.startswith(jsonl(rows(50)))


def test_max_examples_keeps_the_first(jsonl, data_config):
    split = sources.read(data_config(jsonl(rows(50)), eval_fraction=0, max_examples=3))
    assert [r.prompt for r in split.train] == ["question 0", "question 1", "question 2"]


def test_max_examples_counts_those_that_are_kept(jsonl, data_config):
    texts = ["", "a", " ", "b", "", "c"]
    path = jsonl([{"text": text} for text in texts])
    split = sources.read(data_config(path, eval_fraction=0, max_examples=2))
    assert [r.text for r in split.train] == ["a", "b"]
    assert split.dropped == {"empty": 2}


def test_eval_source_is_read_whole(jsonl, data_config):
    config = data_config(jsonl(rows(5)), eval_source=jsonl(rows(3), "held.jsonl"))
    split = sources.read(config)
    assert (len(split.train), len(split.held_out)) == (5, 3)


def test_empty_records_are_dropped_and_counted(jsonl, data_config):
    path = jsonl([{"text": "a"}, {"text": " \n"}, {"text": ""}, {"text": "b"}])
    split = sources.read(data_config(path, eval_fraction=0))
    assert [r.text for r in split.train] == ["a", "b"]
    assert split.dropped == {"empty": 2}


def test_a_text_file_is_one_document_with_a_part_held_out(tmp_path, data_config):
    path = tmp_path / "book.txt"
    text = "".join(f"Paragraph {i} has some words in it.\n\n" for i in range(200))
    path.write_text(text)
    whole = sources.read(data_config(str(path), eval_fraction=0))
    assert "".join(r.text for r in whole.train) == text
    assert [r.ends for r in whole.train] == [False] * (len(whole.train) - 1) + [True]
    split = sources.read(data_config(str(path)))
    assert split.train
    assert split.held_out
    assert set(split.train) | set(split.held_out) == set(whole.train)


def test_python_docs_is_built_in(data_config):
    split = sources.read(data_config("python-docs", max_examples=100))
    assert all(isinstance(r, Chat) for r in split.train + split.held_out)
    assert len(split.train) + len(split.held_out) == 100
    assert split.held_out


def test_hub_splits_and_configuration(hub, data_config):
    calls = hub({"train": rows(4), "test": rows(2)})
    split = sources.read(data_config("org/set", name="main", eval_split="test"))
    assert (len(split.train), len(split.held_out)) == (4, 2)
    assert calls == [("org/set", "main", "train"), ("org/set", "main", "test")]
    assert split.held_out[1].where == "org/set test row 2"


@pytest.mark.parametrize(("eval_source", "name"), [("org/other", None), ("org/set", "main")])
def test_the_configuration_is_that_of_the_source_alone(hub, data_config, eval_source, name):
    calls = hub({"train": rows(4), "test": rows(2)})
    sources.read(data_config("org/set", name="main", eval_source=eval_source, eval_split="test"))
    assert calls == [("org/set", "main", "train"), (eval_source, name, "test")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach\nthe Hub"), "hub cannot be reached.*local file"),
        (datasets.exceptions.DatasetNotFoundError("no"), "neither a file here nor a data set"),
        (ValueError('Unknown split "dev". Should be one of [...]'), "split train: Unknown split"),
        (datasets.exceptions.DataFilesNotFoundError("No files\nhere"), "No files"),
    ],
)
def test_hub_errors_are_one_line(hub, data_config, error, message):
    hub(error)
    with pytest.raises(UserError, match=message) as e:
        sources.read(data_config("org/set"))
    assert "\n" not in str(e.value)
    assert str(e.value).startswith("org/set")


@pytest.mark.parametrize("source", ["absent.jsonl", "./absent", "/a/b", "x/y/z.txt", "a/b.csv"])
def test_what_looks_like_a_file_is_not_looked_for_on_the_hub(hub, data_config, source, tmp_path):
    calls = hub(AssertionError("asked the hub"))
    with pytest.raises(UserError, match="no such file"):
        sources.read(data_config(source))
    assert not calls


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_split": "test"}, "data.eval_split: .* has no splits"),
        ({"name": "main"}, "data.name: .* has no configurations"),
        ({"format": "chat"}, "the fields are prompt, completion; data.format chat needs messages"),
    ],
)
def test_settings_that_do_not_fit_a_file(jsonl, data_config, settings, message):
    with pytest.raises(UserError, match=message):
        sources.read(data_config(jsonl(rows(3)), **settings))


@pytest.mark.parametrize("content", [[], [{"text": ""}]])
def test_no_examples(jsonl, data_config, content):
    with pytest.raises(UserError, match="no examples in it"):
        sources.read(data_config(jsonl(content)))


def test_a_text_file_is_not_a_conversation(tmp_path, data_config):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="plain text"):
        sources.read(data_config(str(tmp_path / "a.txt"), format="chat"))
