"""Runs the whole report on a CPU, and with a wrong kernel, which the report must find."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.bench.gpu.lane import REHEARSAL
from qlora_jax.bench.gpu.parts import PARTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
WRONG = """
import importlib.abc, importlib.machinery, sys

NAME = "qlora_jax.kernels.triton"

class Wrong(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader.exec_module = changed(spec.loader.exec_module)
        return spec

def changed(load):
    def exec_module(module):
        load(module)
        right = module.forward
        def forward(x, q):
            y = right(x, q)
            return y.at[-1, -8:].multiply(1.5) if x.dtype == "float16" else y
        module.forward = forward
    return exec_module

sys.meta_path.insert(0, Wrong())
"""
"""A sitecustomize.py that makes eight float16 results of Triton's forward kernel wrong."""


def rehearse(folder: Path, *arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_jax", "bench", "gpu", "--rehearse", *arguments]
    return subprocess.run(
        [*command, "--output", str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (path, ROOT)))},
        capture_output=True,
        text=True,
    )


def test_everything_runs_and_nothing_declared_is_left_open(tmp_path: Path) -> None:
    done = rehearse(tmp_path)
    assert done.stdout.splitlines()[-1] == f"{len(PARTS)} parts rehearsed, 0 failed", done.stdout
    assert done.returncode == 0
    report = json.loads((tmp_path / "rehearsal.json").read_text("utf-8"))
    assert [part["outcome"] for part in report["parts"]] == ["ok"] * len(PARTS)
    kinds = ("figures", "checks", "absent")
    told = {(row["part"], row["name"]) for kind in kinds for row in report[kind]}
    assert told == {(part.name, name) for part in PARTS for name in part.module.names(REHEARSAL)}
    assert all(row["reason"] for row in report["absent"])
    assert all(row["right"] for row in report["checks"])
    assert (tmp_path / "rehearsal.png").exists()
    text = (tmp_path / "rehearsal.json").read_text("utf-8")
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", text)


def test_a_wrong_kernel_fails_its_part(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG, "utf-8")
    done = rehearse(tmp_path / "report", "--only", "ceilings,products,contexts", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "qlora-jax: 3 parts rehearsed, 1 failed"
    report = json.loads((tmp_path / "report" / "rehearsal.json").read_text("utf-8"))
    wrong = [row["name"] for row in report["checks"] if not row["right"]]
    assert wrong
    assert all(name.startswith("triton forward float16") for name in wrong)
