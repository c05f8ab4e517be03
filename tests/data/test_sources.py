import json
import re

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from qlora_jax.data import hub as hub_module
from qlora_jax.data import sources
from qlora_jax.data.records import Chat, Prompt, Text
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
    """Replaces the hub: it gives the rows of a split, or raises the given error."""
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
    assert all(isinstance(r, Prompt) for r in split.train + split.held_out[""])
    assert len(split.train) + len(split.held_out[""]) == 50
    assert 0 < len(split.held_out[""]) < 25
    assert split.found.dropped == {}
    assert split.train[0].where.startswith(jsonl(rows(50)))


def test_max_examples_keeps_the_first(jsonl, data_config):
    split = sources.read(data_config(jsonl(rows(50)), eval_fraction=0, max_examples=3))
    assert [r.prompt for r in split.train] == ["question 0", "question 1", "question 2"]


def test_max_examples_counts_those_that_are_kept(jsonl, data_config):
    texts = ["", "a", " ", "b", "", "c"]
    path = jsonl([{"text": text} for text in texts])
    split = sources.read(data_config(path, eval_fraction=0, max_examples=2))
    assert [r.text for r in split.train] == ["a", "b"]
    assert split.found.dropped == {"empty": 2}


def test_eval_source_is_read_whole(jsonl, data_config):
    config = data_config(jsonl(rows(5)), eval_source=jsonl(rows(3), "held.jsonl"))
    split = sources.read(config)
    assert (len(split.train), len(split.held_out[""])) == (5, 3)


def test_each_named_held_out_source_is_read_whole(jsonl, data_config):
    sets = {"b": jsonl(rows(3), "b.jsonl"), "a": jsonl(rows(2), "a.jsonl")}
    split = sources.read(data_config(jsonl(rows(5)), eval_source=sets))
    assert len(split.train) == 5
    assert [(name, len(found)) for name, found in split.held_out.items()] == [("b", 3), ("a", 2)]
    assert sources.read(data_config(jsonl(rows(5)), eval_fraction=0)).held_out == {}


def test_empty_records_are_dropped_and_counted(jsonl, data_config):
    path = jsonl([{"text": "a"}, {"text": " \n"}, {"text": ""}, {"text": "b"}])
    split = sources.read(data_config(path, eval_fraction=0))
    assert [r.text for r in split.train] == ["a", "b"]
    assert split.found.dropped == {"empty": 2}


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
    assert set(split.train) | set(split.held_out[""]) == set(whole.train)


def test_python_docs_is_built_in(data_config):
    split = sources.read(data_config("python-docs", max_examples=100))
    assert all(isinstance(r, Chat) for r in split.train + split.held_out[""])
    assert len(split.train) + len(split.held_out[""]) == 100
    assert split.held_out


def test_hub_splits_and_configuration(hub, data_config):
    calls = hub({"train": rows(4), "test": rows(2)})
    split = sources.read(data_config("org/set", name="main", eval_split="test"))
    assert (len(split.train), len(split.held_out[""])) == (4, 2)
    assert calls == [("org/set", "main", "train"), ("org/set", "main", "test")]
    assert split.held_out[""][1].where == "org/set test row 2"


@pytest.mark.parametrize(("eval_source", "name"), [("org/other", None), ("org/set", "main")])
def test_the_configuration_is_that_of_the_source_alone(hub, data_config, eval_source, name):
    calls = hub({"train": rows(4), "test": rows(2)})
    sources.read(data_config("org/set", name="main", eval_source=eval_source, eval_split="test"))
    assert calls == [("org/set", "main", "train"), (eval_source, name, "test")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach\nthe Hub"), "hub cannot be reached.*local file"),
        (datasets.exceptions.DatasetNotFoundError("no"), "neither a local file nor a data set"),
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


def found(config):
    """Returns the lines that reading a source shows to the user, without the folder."""
    folder = str(config.source).rpartition("/")[0]
    return [line.replace(f"{folder}/", "") for line in sources.read(config).found.lines()]


def test_bad_records_are_left_out_and_counted(tmp_path, data_config):
    path = tmp_path / "a.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    bad = ['{"messages": [{"role": "robot", "content": "a"}]}', '{"messages":', '{"size": 3}']
    path.write_text("\n".join([good, bad[0], good, bad[1], bad[2], bad[0], good]))
    split = sources.read(data_config(str(path), eval_fraction=0))
    assert [r.where for r in split.train] == [f"{path}:{n}" for n in (1, 3, 7)]
    (line,) = found(data_config(str(path), eval_fraction=0))
    assert line.startswith(
        "warning: 4 of 7 records left out: 2 messages[0]: unknown role 'robot'; name it user, "
        "assistant, system or tool (first a.jsonl:2); 1 not valid JSON: "
    )
    assert "1 the fields are size; data.format auto needs " in line
    with pytest.raises(UserError, match=r"a\.jsonl:2: messages\[0\]: unknown role 'robot'"):
        sources.read(data_config(str(path), on_bad_record="error"))


def test_where_no_record_can_be_used_the_reasons_are_the_error(jsonl, data_config):
    with pytest.raises(UserError, match=r"none of its records can be used: 3 the fields are a; "):
        sources.read(data_config(jsonl([{"a": "b"}] * 3)))


def test_each_row_is_read_by_its_own_fields(jsonl, data_config):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl([*rows(3), {"messages": turns, "system": "s"}, {"text": "t"}])
    kinds = [type(r) for r in sources.read(data_config(path, eval_fraction=0)).train]
    assert kinds == [Prompt] * 3 + [Chat, Text]
    split = sources.read(data_config(path, eval_fraction=0, format="prompt"))
    assert [type(r) for r in split.train] == [Prompt] * 3
    assert split.found.bad.count == 2


def test_fields_that_no_one_read_are_told_in_a_line(jsonl, data_config):
    path = jsonl([{**row, "id": 7, "url": "u", "more": ""} for row in rows(12)] + [{"text": "a"}])
    assert found(data_config(path)) == ["not read: id, url (12 records)"]
    path = jsonl([{**rows(1)[0], f"f{n}": 1} for n in range(30)])
    (line,) = found(data_config(path))
    assert line.endswith(" and 10 other fields")


def test_empty_answers_are_told_in_a_line(jsonl, data_config):
    def chat(**answer):
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]}

    call = {"function": {"name": "f", "arguments": {}}}
    path = jsonl(
        [
            chat(content="b"),
            chat(content=" \n"),
            chat(content="", tool_calls=[call]),
            chat(content="", weight=0),
            {"prompt": "a", "completion": ""},
            {"text": "a"},
        ]
    )
    (line,) = found(data_config(path))
    assert line == (
        "warning: 2 of 6 records have an empty answer, which trains the end of the turn alone "
        "(first data.jsonl:2); remove them unless that is meant"
    )


def test_null_in_a_table_is_absent(tmp_path, data_config):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"function": {"name": "g", "arguments": {"y": 1}}}
    turns = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [c]}]
        for c in (call, other)
    ]
    table = pyarrow.Table.from_pylist(
        [*({"messages": t, "text": None} for t in turns), {"text": "t"}]
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    train = sources.read(data_config(str(tmp_path / "a.parquet"), eval_fraction=0)).train
    made = [r.messages[1]["tool_calls"][0]["function"] for r in train[:2]]
    assert made == [call["function"], other["function"]]
    assert train[2] == Text(text="t")


def test_several_sources_are_read_one_after_the_other(jsonl, data_config, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    listed = [jsonl(rows(3)), str(tmp_path / "a.txt"), jsonl(rows(2), "b.jsonl")]
    split = sources.read(data_config(listed, eval_fraction=0))
    assert [r.key for r in split.train] == [
        *(f"question {i}\nanswer {i}" for i in range(3)),
        "hello",
        *(f"question {i}\nanswer {i}" for i in range(2)),
    ]
    assert len(sources.read(data_config(listed, eval_fraction=0, max_examples=4)).train) == 4


@pytest.mark.parametrize(
    "source", ["a.jsonl+b.jsonl", "a.txt+b.txt", "python-docs+a.jsonl", "o/a+o/b"]
)
def test_a_plus_between_other_sources_names_the_list(hub, data_config, source):
    calls = hub(AssertionError("asked the hub"))
    expected = f"[{source.replace('+', ', ')}]"
    with pytest.raises(UserError, match=re.escape(f"as a list: {expected}")):
        sources.read(data_config(source))
    assert not calls


def test_a_file_may_have_a_plus_in_its_name(jsonl, data_config):
    assert len(sources.read(data_config(jsonl(rows(3), "a+b.jsonl"), eval_fraction=0)).train) == 3


def test_the_configuration_goes_to_the_one_hub_data_set_of_a_list(hub, jsonl, data_config):
    calls = hub({"train": rows(4)})
    sources.read(data_config([jsonl(rows(3)), "org/set"], name="main"))
    assert calls == [("org/set", "main", "train")]
    with pytest.raises(UserError, match=r"data\.name main: several .*\(org/set, org/other\)"):
        sources.read(data_config(["org/set", "org/other"], name="main"))
    with pytest.raises(UserError, match=r"data\.eval_split: .*data\.jsonl has no splits"):
        sources.read(data_config(["org/set", jsonl(rows(3))], eval_split="test"))


def test_data_files_of_a_folder_that_are_in_no_split_are_named(jsonl, data_config, tmp_path):
    folder = tmp_path / "folder"
    (folder / ".hidden").mkdir(parents=True)
    for name in ("a.jsonl", "train_b.jsonl", "test_c.jsonl", "d.TXT", ".hidden/e.jsonl"):
        jsonl(rows(3), f"folder/{name}")
    (folder / "notes.md").write_text("x")
    split = sources.read(data_config(str(folder), eval_fraction=0))
    assert len(split.train) == 3
    (line,) = split.found.lines()
    assert line.startswith(f"warning: {folder}: not read, because they belong to no split: ")
    assert ": a.jsonl, d.TXT; " in line


def test_a_folder_whose_files_are_all_in_a_split_has_no_warning(jsonl, data_config, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        jsonl(rows(3), f"folder/{name}")
    split = sources.read(data_config(str(tmp_path / "folder"), eval_split="test"))
    assert (len(split.train), len(split.held_out[""]), split.found.lines()) == (3, 3, [])
