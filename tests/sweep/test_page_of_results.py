import base64
import json
from html.parser import HTMLParser

import pytest

from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep.report import report

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VERDICT = {
    "experiment": "rank",
    "question": "Does <rank> matter?",
    "paper": "no",
    "ours": "0.01 & less",
    "interval": [0.0, 0.02],
    "verdict": "agrees",
}


def make(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_text(json.dumps(VERDICT | changes))
    (folder / "analysis.md").write_text(
        "# rank\n\nIntro\n\n## Losses\n\n| a | b |\n| --- | --- |\n| x<y | 2 |\n\n![p](p.png)\n"
    )
    (folder / "results.jsonl").write_text("{}\n")
    (folder / "manifest.json").write_text(
        json.dumps({"command": "qlora-jax sweep rank", "cells": 4})
    )
    (folder / "p.png").write_bytes(PNG)


class Page(HTMLParser):
    """A parser that collects links and text, and fails on an unclosed tag."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_every_sweep_and_needs_no_network(tmp_path):
    make(tmp_path / "rank")
    make(tmp_path / "deep" / "parity", experiment="parity")
    assert report(tmp_path, tmp_path / "page.html", "qlora-jax report") == 2
    page = Page((tmp_path / "page.html").read_text())
    inlined = [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert [base64.b64decode(link.partition(",")[2]) for link in inlined] == [PNG, PNG]
    others = [link for link in page.links if link not in inlined]
    assert not [link for link in others if ":" in link]
    assert {"#rank", "#parity", "rank/results.jsonl", "deep/parity/analysis.md"} <= set(others)
    for text in ("Does <rank> matter?", "0.01 & less", "x<y", "qlora-jax sweep rank", "Losses"):
        assert text in page.text
    assert "Intro" not in page.text


def test_without_results_there_is_no_page(tmp_path):
    with pytest.raises(UserError, match="no finished sweep in it; run qlora-jax sweep NAME first"):
        report(tmp_path, tmp_path / "page.html", "")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "is missing")]
)
def test_a_damaged_verdict_is_named(tmp_path, text, says):
    make(tmp_path / "rank")
    (tmp_path / "rank" / "verdict.json").write_text(text)
    with pytest.raises(UserError, match=rf"rank/verdict.json: .*{says}"):
        report(tmp_path, tmp_path / "page.html", "")
    assert not (tmp_path / "page.html").exists()
