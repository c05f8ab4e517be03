"""Tests experiments/benchmarks/compare.py: which earlier rounds it keeps, and its page."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experiments.benchmarks import compare as compare_script
from experiments.tools import pages
from qlora_jax.bench import tools
from qlora_jax.bench.options import LoadOptions
from qlora_jax.runtime.errors import UserError


@pytest.fixture
def compare(
    make_peer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> ModuleType:
    """Returns the script with one section and a fake interpreter of ours, which answers at once."""
    figures = {"load": {"unit": "s", "value": 1}}
    ours = make_peer("ours", [], figures, device="a device", variants={})
    monkeypatch.setattr(tools, "ours", lambda: tools.Tool("qlora-jax", str(ours)))
    section = compare_script.Section("Loading", "load", LoadOptions(str(tiny_model)))
    monkeypatch.setattr(compare_script, "SECTIONS", {"load": section})
    return compare_script


def test_rounds_go_on_and_other_code_starts_anew(
    compare: ModuleType,
    make_peer: Callable[..., Path],
    runs_of: Callable[[Path], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages = ["torch", "bitsandbytes", "transformers", "accelerate"]
    peer = make_peer("peer", packages, {"load": {"unit": "s", "value": 4}})
    page, out = tmp_path / "page.md", tmp_path / "results" / "line.json"
    page.write_text("before\n<!-- begin line -->\nold\n<!-- end line -->\nafter\n")
    arguments = ["compare", "all", "--peer", str(peer), "--out", str(out), "--page", str(page)]

    def run(*more: str) -> list[Any]:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        compare.main()
        return json.loads(out.read_text())["load"]["rounds"]

    assert len(run("--rounds", "1")) == 1
    assert len(run("--rounds", "2")) == 2
    assert len(run("--rounds", "2")) == 2
    assert len(runs_of(peer)) == 2
    assert len(run("--rounds", "3", "--minutes", "0")) == 2
    text = page.read_text()
    assert text.startswith("before\n<!-- begin line -->\n")
    assert text.endswith("<!-- end line -->\nafter\n")
    assert "old" not in text
    assert re.search(r"\| load, s \| 1 +\| 4 +\| 0.25 +\|", text)
    assert "![line](results/line.png)" in text
    assert out.with_suffix(".png").exists()

    key = compare._key
    monkeypatch.setattr(compare, "_key", lambda *a: key(*a) | {"code": "another"})
    assert len(run("--rounds", "1")) == 1
    assert len(runs_of(peer)) == 3


def test_a_page_without_its_place(compare: ModuleType) -> None:
    with pytest.raises(UserError, match="it needs one line <!-- begin x -->"):
        compare.replaced("text", "x", "new")


@pytest.mark.parametrize("page", ["text", "<a>", "</a><a>", "<a><a></a>", "<a></a></a>"])
def test_a_page_has_each_mark_once_and_in_order(page: str, tmp_path: Path) -> None:
    marks = pages.Marks("<a>", "</a>")
    with pytest.raises(ValueError, match="not one <a> and after it one </a>"):
        pages.replaced(page, marks, "new")
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(UserError, match="add the lines <a> and </a> where the tables belong"):
        pages.write(path, marks, "new")
    assert path.read_text() == page


def test_every_section_names_a_benchmark_with_its_options() -> None:
    from qlora_jax.bench.options import BENCHMARKS

    for section in compare_script.SECTIONS.values():
        assert type(section.options) is BENCHMARKS[section.what]
        assert section.against is None or type(section.against[1]) is type(section.options)
