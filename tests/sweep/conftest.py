"""Fixtures: a toy experiment whose cells record in files that they ran."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

TOY = """
import os, signal, time
from pathlib import Path
from qlora_jax.sweep import Analysis, Experiment, Population, Verdict, markdown
from qlora_jax.sweep import statistics

RAN = Path({ran!r})

def run(cell, context):
    with open(RAN / "began", "a") as file:
        file.write(cell.id + "\\n")
    {body}
    with open(RAN / "ended", "a") as file:
        file.write(cell.id + "\\n")
    return {{"loss": cell["rank"] / 8 + cell["seed"], "pid": os.getpid()}}

def analyse(table):
    interval = statistics.mean(table.column("loss"))
    rows = [{{"rank": r, "cells": len(t)}} for (r,), t in table.groups("rank").items()]
    return Analysis(Verdict("the loss", interval, statistics.within(interval, 0)),
                    {{"By rank": markdown(rows)}})

EXPERIMENT = Experiment(
    name="toy", question="Does it?", paper="Yes (table 1).", expected="Yes.", cost="seconds",
    axes={{"rank": [8, 16, 4096], "method": ["qlora", "lora"]}}, seeds=(0, 1),
    run=run, analyse=analyse,
    skip=lambda cell: "rank above the matrix" if cell["rank"] > 64 else None,
    {more}
)
"""


class Toy:
    """The file and results of an experiment with 8 cells to run and 4 to skip."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.out = folder, folder / "toy.py", folder / "out"
        self.write()

    def write(self, body: str = "pass", more: str = "") -> Path:
        self.path.write_text(TOY.format(ran=str(self.folder), body=body, more=more))
        return self.path

    def runs(self, what: str = "ended") -> list[str]:
        """Returns the ids of cells that `ended` or `began`, once for each time."""
        file = self.folder / what
        return file.read_text().split() if file.exists() else []

    def arguments(self, *more: str) -> list[str]:
        return ["sweep", str(self.path), "--out", str(self.out), *more]

    def start(self, *more: str) -> "subprocess.Popen[bytes]":
        """Starts the sweep in a separate process."""
        return subprocess.Popen(
            [sys.executable, "-m", "qlora_jax", *self.arguments(*more)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait_for(self, what: str, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.runs(what)) < count:
            assert time.monotonic() < deadline, f"{count} cells never {what}"
            time.sleep(0.005)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


@pytest.fixture
def sweep(toy: Toy, run_cli: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that runs the toy experiment in this process."""
    return lambda *more: run_cli(*toy.arguments(*more))


@pytest.fixture
def environment() -> Mapping[str, str]:
    return os.environ
