"""Tests that only measured figures meet a target, and the page that shows the targets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.bench.gpu import targets

ROOT = Path(__file__).parents[3]


def timed(implementation: str, rows: int, us: float, **changes: Any) -> list[dict[str, Any]]:
    """Returns rows with a made-up time in both directions."""
    own = {"part": "times", "field": "time", "implementation": implementation, "rows": rows}
    shape = {"k": 4096, "n": 11008, "value": us, "unit": "us", "name": "", "dtype": "bfloat16"}
    return [own | shape | {"direction": d} | changes for d in ("forward", "backward")]


def stepped(case: str, **figures: float) -> list[dict[str, Any]]:
    rows = figures.items()
    return [
        {"part": "steps", "field": f, "case": case, "value": v, "unit": "", "name": ""}
        for f, v in rows
    ]


@pytest.fixture
def report() -> dict[str, Any]:
    figures = timed("mosaic", 1, 10) + timed("mosaic", 4, 11) + timed("mosaic", 16, 13)
    figures += timed("mosaic", 64, 20) + timed("bitsandbytes", 64, 50)
    figures += timed("mosaic", 512, 80) + timed("xla", 512, 100)
    figures += timed("mosaic", 2048, 103) + timed("xla", 2048, 100)
    figures += stepped("7B, 512 tokens", speed=150.0, peak=1000.0, planned=980.0)
    figures += stepped("PEFT, 7B, 512 tokens", speed=100.0, peak=2000.0)
    figures += stepped("65B, 512 tokens", peak=45000.0, planned=45000.0)
    checks = [{"part": "products", "name": "a", "right": True}]
    return {"figures": figures, "checks": checks, "absent": [], "parts": []}


def test_what_is_measured_and_what_is_not(report: dict[str, Any]) -> None:
    found = [(round(value, 3), word) for _, _, value, word in targets.rows(report)]
    assert found == [
        (0, "met"),
        (13, "met"),
        (2.5, "missed"),
        (0.8, "met"),
        (0.02, "met"),
        (47.186, "met"),
        (1.5, "met"),
    ]
    assert [name for name, _ in targets.missing(report)] == ["2048 and 8192 rows, of decode + GEMM"]


def test_one_missing_or_wrong_figure_is_enough(report: dict[str, Any]) -> None:
    report["figures"] = [
        row
        for row in report["figures"]
        if (row.get("rows"), row.get("direction")) != (4, "backward")
    ]
    report["checks"].append({"part": "contexts", "name": "b", "right": False})
    words = {name: (value, word) for name, _, value, word in targets.rows(report)}
    assert words["wrong products"] == (1, "missed")
    assert not any("1, 4 and 16" in name for name in words)


def test_nothing_measured_meets_nothing() -> None:
    nothing: dict[str, Any] = {"figures": [], "checks": []}
    assert not list(targets.rows(nothing))
    assert len(targets.missing(nothing)) == len(targets.TARGETS)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.tools.gpu_page", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_page(report: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("a\n<!-- gpu_page.py begins -->old<!-- gpu_page.py ends -->\nb\n")
    done = run("--write", str(page), "--reports", str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.count("not measured") == len(targets.TARGETS)
    assert "old" not in text
    folder = tmp_path / "reports"
    folder.mkdir()
    facts = {"device": "Made Up", "backend": "gpu", "versions": {}, "command": "c", "schema": 1}
    (folder / "made-up.json").write_text(json.dumps(report | facts))
    assert run("--write", str(page), "--reports", str(folder)).returncode == 0
    text = page.read_text()
    assert "## Made Up" in text
    assert text.count("not measured") == 1
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")
