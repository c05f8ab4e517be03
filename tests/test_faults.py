"""Checks which results experiments/faults counts as faults, and that it finds a planted one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.faults import common, formats, fuzz, mutate

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "experiments.faults"]
TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 1\nKeyError: 3\n'


@pytest.mark.parametrize(
    ("code", "err", "fault"),
    [
        (0, "", None),
        (0, "anything\n" * 50, None),
        (2, "qlora-jax: a.json: no such file\n", None),
        (2, "progress\nqlora-jax: a\n", None),
        (None, "loading\n", "still running after 3 s; last line: loading"),
        (1, TRACEBACK, "traceback, exit code 1: KeyError: 3"),
        (0, TRACEBACK + "qlora-jax: a\n", "traceback, exit code 0: KeyError: 3"),
        (2, "usage: qlora-jax\n", "exit code 2 without a line of ours: usage: qlora-jax"),
        (-9, "", "exit code -9: "),
        (2, "noise\n" * 12 + "qlora-jax: a\n", "13 lines on stderr around: qlora-jax: a"),
    ],
)
def test_what_counts_as_a_fault(code, err, fault):
    ended = common.Ended(code=code, out="", err=err, seconds=3.2, computed=1.0, peak=0)
    assert ended.fault(0, 2) == fault


def test_damage_follows_from_the_seed_and_changes_the_file():
    text = json.dumps({"a": [1, 2, {"b": None}], "c": "d"}).encode()
    for mutation in {*mutate.BY_SUFFIX.values(), *mutate.BYTES}:
        made = [mutation(text * 20, random.Random(i)) for i in range(40)]
        assert made == [mutation(text * 20, random.Random(i)) for i in range(40)]
        assert len(set(made)) > 20 or mutation is mutate.garbage


def test_a_reader_that_breaks_is_found(tmp_path, monkeypatch):
    (tmp_path / "seeds" / "data_csv").mkdir(parents=True)
    (tmp_path / "seeds" / "data_csv" / "x.csv").write_text("prompt,completion\na,b\n")

    def read(folder):
        if read.breaks:
            raise IndexError("planted")

    chosen = formats.Format(name="data_csv", files=("x.csv",), read=read, arguments=())
    monkeypatch.setattr(formats, "FORMATS", (chosen,))
    for read.breaks, expected in ((False, ""), (True, "IndexError at nowhere: 'planted'")):
        folder = tmp_path / str(read.breaks)
        assert fuzz.attempt(tmp_path / "seeds", 0, 1, folder) == ("data_csv/x.csv", expected)


@pytest.mark.slow
def test_a_short_campaign_finds_nothing(tmp_path):
    parts, out = ("fuzz", "commands", "disks"), tmp_path / "rows.json"
    done = subprocess.run(
        [*PROGRAM, f"--parts={','.join(parts)}", "--scale=0.02", f"--out={out}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    tried = {part: sum(row["tried"] for row in rows if row["part"] == part) for part in parts}
    assert tried["fuzz"] == 200
    assert tried["commands"] == 6
    assert {row["part"] for row in rows} == set(parts)
