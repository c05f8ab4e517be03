import json

import pyarrow
import pytest
from pyarrow import parquet

from qlora_jax.data.files import read_rows, read_text
from qlora_jax.runtime.errors import UserError

ROWS = [{"text": 'a, "quoted"\nline'}, {"text": "b\u2028c"}, {"text": "日本"}]


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_jsonl(tmp_path):
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)
    path = write(tmp_path / "a.jsonl", "\ufeff" + lines.replace("\n", "\r\n\n", 1) + "\n")
    rows = list(read_rows(path))
    assert [r for r, _ in rows] == ROWS
    assert [w for _, w in rows] == [f"{path}:1", f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_json(tmp_path, wrapped):
    tree = {"version": 1, "data": ROWS} if wrapped else ROWS
    path = write(tmp_path / "a.json", json.dumps(tree, indent=1))
    assert [r for r, _ in read_rows(path)] == ROWS
    assert next(read_rows(path))[1] == f"{path} item 1"


def test_csv(tmp_path):
    path = write(
        tmp_path / "a.csv", 'text,n\r\n"a, ""quoted""\nline",1\r\nb\u2028c,2\r\n日本,3\r\n'
    )
    rows = list(read_rows(path))
    assert [r["text"] for r, _ in rows] == [r["text"] for r in ROWS]
    assert [w for _, w in rows] == [f"{path}:3", f"{path}:4", f"{path}:5"]


def test_csv_fields_may_be_long(tmp_path):
    path = write(tmp_path / "a.csv", "text\n" + "x" * 200_000)
    assert len(next(read_rows(path))[0]["text"]) == 200_000


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read_rows(path)) == [(r, f"{path} row {i}") for i, r in enumerate(ROWS, 1)]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([2**31 - 1], pyarrow.date32()),
        pyarrow.array([0], pyarrow.timestamp("s", "Nowhere/None")),
        pyarrow.array([2**62], pyarrow.timestamp("us")),
        pyarrow.array([b"\xb1"]).view(pyarrow.string()),
    ],
    ids=["year 5,881,580", "no such zone", "year 148,000", "not UTF-8"],
)
def test_parquet_of_what_python_has_not(tmp_path, column):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file: ."):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON: .* at column"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]\n', r"a\.jsonl:3: must be a JSON object, not list"),
        ("a.json", '[{"text": "a"},\n{"text": b}]', r"a\.json:2: not valid JSON"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', r"rename it to \.jsonl"),
        ("a.json", '{"text": "a"}', "must be a list of objects"),
        ("a.json", '[{"text": "a"}, 3]', "item 2: must be a JSON object, not int"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv:3: the row does not have the header's 2 columns"),
        ("a.csv", "a,b\n1\n", r"a\.csv:2: the row does not have the header's 2 columns"),
        ("a.csv", 'a,b\n"1,2\n', r"a\.csv:\d: not valid CSV"),
        ("a.parquet", "no", "not a readable Parquet file"),
        ("a.docx", "x", r"ends in \.jsonl, \.json, \.csv, \.parquet, \.txt"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as e:
        list(read_rows(write(tmp_path / name, text)))
    assert "\n" not in str(e.value)
    assert str(tmp_path / name) in str(e.value)


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e")
    with pytest.raises(UserError, match=r"a\.txt:3: not UTF-8"):
        read_text(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
