"""Tests how names and texts from files and users are printed."""

import io
import subprocess
import sys

import pytest

from qlora_jax import cli
from qlora_jax.runtime import streams


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("caf\u00e9 \u4f60 \U0001f468\u200d\U0001f469 \u0646\u200c", None),
        ("\x1b[2Ja\x1b]0;title\x07", r"\x1b[2Ja\x1b]0;title\x07"),
        ("a\rb\x7f\x9b", r"a\rb\x7f\x9b"),
        ("\u202eevil\u2069", r"\u202eevil\u2069"),
        ("\udcff", r"\udcff"),
    ],
)
def test_printable(text, shown):
    assert streams.printable(text) == (text if shown is None else shown)


def test_an_error_shows_no_codes_of_a_name(capsys):
    assert cli.main(["train", "no\x1b[2Jsuch.yaml"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert r"no\x1b[2Jsuch.yaml" in said


def test_an_answer_is_escaped_on_a_terminal_alone(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert streams.to_read("a\x1b[2J") == "a\x1b[2J"
    monkeypatch.setattr(out, "isatty", lambda: True)
    assert streams.to_read("a\x1b[2J") == r"a\x1b[2J"


def test_a_character_that_a_stream_lacks_is_escaped():
    code = "from qlora_jax.runtime import streams\nwith streams.outlets(): print('\\u4f60 \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "\\u4f60 \\udcff\n"), done.stderr
