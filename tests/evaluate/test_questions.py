import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from qlora_jax.evaluate.questions import Question, read, split_of, title
from qlora_jax.runtime.errors import UserError

ROW = {"question": "Which?", "choices": ["this", "that"], "answer": 1, "subject": "logic"}


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return to


@pytest.mark.parametrize("answer", [1, "1", "B", " B "])
def test_a_letter_and_an_index_are_the_same(write, answer):
    path = write("q.jsonl", json.dumps(ROW | {"answer": answer}) + "\n")
    assert read(path, "test") == [Question("Which?", ("this", "that"), 1, "logic")]


def test_mmlus_own_files(write, tmp_path):
    write("data/test/high_school_art_test.csv", '"Who, then?",a,b,c,d,C\nMulti,1,2,3,4,A\n')
    write("data/test/anatomy_test.csv", "Where?,e,f,g,h,D\n")
    write("data/dev/anatomy_dev.csv", "Dev?,e,f,g,h,A\n")
    found = read(str(tmp_path / "data"), "test")
    assert found == [
        Question("Where?", ("e", "f", "g", "h"), 3, "anatomy"),
        Question("Who, then?", ("a", "b", "c", "d"), 2, "high_school_art"),
        Question("Multi", ("1", "2", "3", "4"), 0, "high_school_art"),
    ]
    assert found[2].where.endswith("high_school_art_test.csv:2")
    one = read(str(tmp_path / "data" / "test" / "anatomy_test.csv"), "ignored")
    assert one == found[:1]


def test_a_header_names_the_columns(write):
    path = write("q.csv", "subject,question,choices,answer\nart,Q?,\"['x', 'y']\",B\n")
    assert read(path, "test") == [Question("Q?", ("x", "y"), 1, "art")]


def test_parquet(tmp_path):
    path = tmp_path / "mmlu.parquet"
    parquet.write_table(pa.Table.from_pylist([ROW, ROW | {"answer": 0}]), path)
    assert [q.answer for q in read(str(path), "test")] == [1, 0]


def test_names(tmp_path, write):
    assert title("cais/mmlu") == "mmlu"
    path = write("sub/anatomy_test.csv", "")
    assert (title(path), split_of(path)) == ("anatomy", "test")
    path = write("my_questions.jsonl", "")
    assert (title(path), split_of(path)) == ("my_questions", "all")
    assert title(str(tmp_path / "sub")) == "sub"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "answer must be A to B or 0 to 1, not 2"),
        ({"answer": "C"}, "answer must be A to B"),
        ({"answer": -1}, "answer must be"),
        ({"answer": True}, "answer must be"),
        ({"answer": None}, "no answer in it"),
        ({"choices": ["one"]}, "choices must be a list of 2 to 26"),
        ({"choices": "a, b"}, "choices must be a list"),
        ({"choices": ["a", ""]}, "a choice must be text"),
        ({"choices": ["a", 3]}, "a choice must be text, not 3"),
        ({"question": "  "}, "question must be text"),
        ({"question": 7}, "question must be text, not 7"),
    ],
)
def test_bad_rows_are_named(write, changes, message):
    good = json.dumps(ROW)
    path = write("q.jsonl", f"{good}\n{json.dumps(ROW | changes)}\n")
    with pytest.raises(UserError, match=r"q\.jsonl:2: ") as error:
        read(path, "test")
    assert message in str(error.value)


def test_bad_files(write):
    with pytest.raises(UserError, match=r"q\.csv:2: 5 columns; without a header"):
        read(write("q.csv", "Q?,a,b,c,d,A\nQ?,a,b,c,D\n"), "test")
    with pytest.raises(UserError, match="no questions in it"):
        read(write("q.jsonl", "\n"), "test")
