"""Tests the restart that requests huge pages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.runtime import hugepages

CHILD = """
import json, os, sys
from qlora_jax.runtime import hugepages
hugepages.on_request = lambda: True
print("started", flush=True)
hugepages.restart()
print(json.dumps([os.environ["GLIBC_TUNABLES"], sys.argv[1:]]))
"""


def run(tunables: str) -> tuple[int, list]:
    """Returns how often the child started, and the tunables and arguments of its last start."""
    command = [sys.executable, "-c", CHILD, "a b", "--json", ""]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLIBC_TUNABLES": tunables}
    lines = subprocess.check_output(command, env=environment, text=True).splitlines()
    return lines.count("started"), json.loads(lines[-1])


def test_restarts_once_with_its_arguments() -> None:
    starts, (tunables, arguments) = run("glibc.malloc.check=0")
    assert starts == 2
    assert tunables == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert arguments == ["a b", "--json", ""]


def test_a_no_is_heard() -> None:
    starts, (tunables, *_) = run("glibc.malloc.hugetlb=0")
    assert (starts, tunables) == (1, "glibc.malloc.hugetlb=0")


@pytest.mark.parametrize(
    ("libc", "text", "expected"),
    [
        ("glibc 2.36", "always [madvise] never", True),
        ("glibc 2.34", "always [madvise] never", False),
        ("glibc 2.36", "[always] madvise never", False),
        ("glibc 2.36", "always madvise [never]", False),
        ("glibc 2.36", None, False),
        ("musl", "always [madvise] never", False),
    ],
)
def test_asks_only_where_it_is_given(tmp_path, monkeypatch, libc, text, expected) -> None:
    switch = tmp_path / "enabled"
    if text is not None:
        switch.write_text(text)
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    assert hugepages.on_request(switch) is expected
