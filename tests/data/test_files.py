import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from qlora_jax.data import files
from qlora_jax.data.bad_records import BadRecords
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


def test_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tn\n"a, ""quoted""\nline"\t1\nb, c\t2\n')
    assert list(read_rows(path)) == [
        ({"text": 'a, "quoted"\nline', "n": "1"}, f"{path}:3"),
        ({"text": "b, c", "n": "2"}, f"{path}:4"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("A.JSONL", '{"text": "a"}\n'),
        ("a.ndjson", '{"text": "a"}\n'),
        ("a.Json", '[{"text": "a"}]'),
        ("a.jsonl.gz", '{"text": "a"}\n'),
        ("a.b.ndjson.GZ", '{"text": "a"}\n'),
        ("a.json.gz", '[{"text": "a"}]'),
        ("a.csv.gz", "text\na\n"),
        ("a.tsv.gz", "text\na\n"),
    ],
)
def test_endings(tmp_path, name, text):
    pack = gzip.compress if name.lower().endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert [row for row, _ in read_rows(tmp_path / name)] == [{"text": "a"}]


def test_a_packed_text_file(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    assert read_text(tmp_path / "a.txt.gz") == "hello"


@pytest.mark.parametrize("cut", [1, 12, 30])
def test_a_packed_file_that_is_cut_off(tmp_path, cut):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abcdefgh"}' * 9)[:cut])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: not a whole gzip file: .*pack it again"):
        list(read_rows(tmp_path / "a.jsonl.gz"))


def test_a_packed_file_is_unpacked_to_a_bound(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 2001))
    monkeypatch.setattr(files, "MOST", 2000)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: more than .* when unpacked; unpack it"):
        list(read_rows(tmp_path / "a.jsonl.gz"))
    monkeypatch.setattr(files, "MOST", 2001)
    assert list(read_rows(tmp_path / "a.jsonl.gz")) == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["x"]\n{"text": "b"}\n', "must be a JSON object, not list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n{"text": "b"}\n', "not UTF-8"),
        ("a.json", b'[{"text": "a"}, 3, {"text": "b"}]', "must be a JSON object, not int"),
        ("a.csv", b"text\na\n1,2\nb\n", "the header's 1 columns"),
        ("a.tsv", b"text\na\n1\t2\nb\n", "the header's 1 columns"),
    ],
)
def test_a_bad_row_is_left_out(tmp_path, name, text, reason):
    (tmp_path / name).write_bytes(text)
    bad = BadRecords("drop")
    assert [row for row, _ in read_rows(tmp_path / name, bad)] == [{"text": "a"}, {"text": "b"}]
    assert bad.count == 1
    assert reason in bad.reasons()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"text": "a"},'),
        ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n'),
        ("a.csv", "a,b,a\n1,2,3\n"),
        ("a.parquet", "no"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_no_bad_row(tmp_path, name, text):
    with pytest.raises(UserError):
        list(read_rows(write(tmp_path / name, text), BadRecords("drop")))


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
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv:1: two columns are named 'a'; rename one"),
        ("a.parquet.gz", "no", r"a data file ends in \.jsonl"),
        ("a.gz", "no", r"a data file ends in \.jsonl"),
        ("a.parquet", "no", "not a readable Parquet file"),
        ("a.docx", "x", r"ends in \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet, \.txt, or"),
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
