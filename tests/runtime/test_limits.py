"""Tests commands under limits of the process."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax import commands

HERE = {"PYTHONPATH": str(Path(__file__).parents[2])}


def limited(limit):
    """Runs `qlora-jax plan` under a limit of the shell's `ulimit`."""
    return subprocess.run(
        [
            "bash",
            "-c",
            f'ulimit {limit} && exec "$0" -m qlora_jax plan no-such-model',
            sys.executable,
        ],
        env=os.environ | HERE,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        ("-n 16", "at most 16 files may be open at a time, and 32 are needed"),
        (f"-v {2**20}", "the address space is limited to 1.0 GiB, and 2 GiB are"),
    ],
)
def test_a_limit_that_is_too_low_is_one_line(limit, line):
    done = limited(limit)
    assert done.returncode == 2
    assert done.stderr.startswith(f"qlora-jax: {line}")
    assert done.stderr.count("\n") == 1


def test_a_limit_of_files_that_may_be_raised_is():
    assert "no-such-model" in limited("-S -n 16").stderr


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory; "),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open; "),
    ],
)
def test_an_error_of_a_limit_is_one_line(run_cli, monkeypatch, error, line, debug):
    def train(*_):
        raise error

    monkeypatch.setattr(commands.train, "run", train)
    ended = run_cli("train", "c.yaml", *(["--debug"] if debug else []))
    assert ended.code == 2
    assert ended.message.startswith(f"qlora-jax: {line}")
    assert ("Traceback" in ended.err) == debug
