"""Tests JSON and YAML from users: every error is one line and comes quickly."""

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qlora_jax
from qlora_jax import config as configs
from qlora_jax.data import files
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft.config import read_config
from qlora_jax.runtime import json_files, manifest
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.metrics import read_metrics

BAD = {
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "100,000 lists": b'{"a": ' + b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "no text": b"\xff\xfe\x00{",
    "cut off": b'{"a": 1',
    "nothing": b"",
    "no object": b"[1, 2]",
}


def settings(path: Path) -> object:
    return json_files.read_object(path, "mend it")


def model(path: Path) -> object:
    return open_folder(Path(path.rename(path.with_name("config.json"))).parent)


def run(path: Path) -> object:
    return manifest.read(Path(path.rename(path.with_name("manifest.json"))).parent)


def rows(path: Path) -> object:
    return list(files.read_rows(Path(path.rename(path.with_name("x.jsonl")))))


def figures(path: Path) -> object:
    path.write_bytes(path.read_bytes() + b"\n{}\n")  # only a last line may be cut off
    return read_metrics(path)


@pytest.mark.parametrize("read", [settings, model, read_config, run, rows, figures])
@pytest.mark.parametrize("what", BAD)
def test_bad_json_is_one_line_that_names_the_file(
    tmp_path: Path, what: str, read: Callable[[Path], object]
) -> None:
    if read is rows and what == "nothing":
        pytest.skip("no rows")
    path = tmp_path / "x.json"
    path.write_bytes(BAD[what])
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_parse_is_json(tree: object) -> None:
    assert json_files.parse(json.dumps(tree)) == tree
    assert json_files.parse(json.dumps(tree).encode()) == tree


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match="not a regular file"):
        settings(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"none: no such file"):
        settings(tmp_path / "none")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(json_files.MOST + 1)
    with pytest.raises(UserError, match="268435457 bytes are too many"):
        settings(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 10_000, "a: " + "9" * 5000])
def test_bad_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml.*: not valid YAML") as caught:
        configs.load_config(path)
    assert "\n" not in str(caught.value)


OWN = ("bench", "plan/plan.py", "gpu/product.py")
"""Modules that parse the output of our own processes."""


def test_no_other_module_parses_json_from_elsewhere() -> None:
    (package,) = map(Path, qlora_jax.__path__)
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.startswith(OWN) or name == "runtime/json_files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("json.load", "json.loads"), name
