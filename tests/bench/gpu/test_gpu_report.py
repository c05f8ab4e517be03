"""Tests lines of results and the report made from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.bench.gpu import page, record, report
from qlora_jax.bench.gpu.record import Recorder
from qlora_jax.gpu import measured
from qlora_jax.gpu.roofline import Ceilings


def lines(tmp_path: Path) -> Path:
    """Writes lines of a made-up device and returns their path; no figure was measured."""
    path = tmp_path / "lines.jsonl"
    first = Recorder(path, "ceilings")
    facts = {"device": "Made Up 1", "backend": "gpu", "capability": "8.0", "versions": {"jax": "9"}}
    for name, value in facts.items():
        first.fact(name, value)
    first.figure("copy", "GB/s", np.float32(1000))
    first.figure("matmul", "TFLOP/s", 100.0, field="matmul bfloat16")
    first.end(1.0, "ok")
    checks = Recorder(path, "products")
    checks.check("mosaic a", True, mean=1.2)
    checks.check("mosaic b", False, mean=3.0)
    checks.absent("triton a", "needs another GPU")
    checks.end(2.0, "ok")
    times = Recorder(path, "times")
    for name, rows, us in (("mosaic", 1, 5.0), ("xla", 1, 9.0), ("mosaic", 16, 6.0)):
        times.figure(
            f"{name} {rows}",
            "us",
            us,
            field="time",
            implementation=name,
            direction="forward",
            rows=rows,
            k=64,
            n=128,
            dtype="bfloat16",
            **{"GB/s": 1.0, "TFLOP/s": 2.0},
        )
    times.end(3.0, "ok")
    steps = Recorder(path, "steps")
    for kind, value in (("speed", 100.0), ("peak", 2048.0), ("planned", 2000.0)):
        steps.figure(f"7B: {kind}", "MiB", value, field=kind, case="7B")
    steps.end(1.0, "failed with code 1: no")
    return path


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    return report.build(record.read([lines(tmp_path)]), "qlora-jax bench gpu")


def test_a_report_is_plain_json(made: dict[str, Any]) -> None:
    assert json.loads(json.dumps(made)) == made
    assert made["figures"][0]["value"] == 1000
    assert (made["schema"], made["device"]) == (1, "Made Up 1")
    assert [part["outcome"] for part in made["parts"]] == ["ok"] * 3 + ["failed with code 1: no"]


def test_a_part_fails_by_a_wrong_check_a_crash_or_an_error(made: dict[str, Any]) -> None:
    assert report.failed(made) == ["products", "steps"]
    assert report.last_line(made, rehearsed=True) == "4 parts rehearsed, 2 failed"
    made["absent"][0]["error"] = True
    made["checks"] = []
    assert report.failed(made) == ["products", "steps"]


def test_what_is_run_again_counts_and_nothing_measured_is_lost(tmp_path: Path) -> None:
    path = lines(tmp_path)
    again = Recorder(path, "products")
    again.check("mosaic b", True)
    again.absent("mosaic a", "not begun")
    again.end(1.0, "ok")
    built = report.build(record.read([path]), "")
    assert {row["name"]: row["right"] for row in built["checks"]} == {
        "mosaic a": True,
        "mosaic b": True,
    }
    assert report.failed(built) == ["steps"]


def test_a_line_is_json_whatever_the_value(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a", "p")
    recorder.check("x", np.bool_(False), worst=float("inf"), losses=[np.float32(1.5), float("nan")])
    text = (tmp_path / "a").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert line["worst"] == "inf"
    assert line["losses"] == [1.5, "nan"]
    assert line["right"] is False


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = lines(tmp_path)
    whole = list(record.read([path]))
    path.write_text(path.read_text() + '{"part": "times", "ki')
    assert list(record.read([path])) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/project/x.py: line 3", "x.py: line 3"),
        ("~/secret/y.yaml is bad", "y.yaml is bad"),
        ("12 GB/s and 3/4 of it", "12 GB/s and 3/4 of it"),
        ("--output runs/a", "--output runs/a"),
    ],
)
def test_folders_are_taken_out(text: str, expected: str) -> None:
    assert record.without_folders(text) == expected


def test_the_page(made: dict[str, Any]) -> None:
    text = page.text(made)
    assert "| 1 | 5 | 9 | 1 | 2 |" in text  # rows, mosaic, xla, rates of the fastest
    assert "| 16 | 6 |  | 1 | 2 |" in text
    assert "| 7B | 100 |  |  | 2 | 1.95 | 1.02 |" in text
    assert "- products: mosaic b: mean 3" in text
    assert "| products | 1 | triton a | needs another GPU |" in text
    assert "4 parts run, 2 failed." in text


def test_the_picture(made: dict[str, Any], tmp_path: Path) -> None:
    page.picture(made, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page.picture(made | {"figures": []}, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_the_model_of_times_reads_it(made: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"{report.slug(made['device'])}.json"
    assert path.name == "made-up-1.json"
    path.write_text(json.dumps(made))
    read = measured.GpuReport(path)
    assert read.ceilings("bfloat16") == Ceilings(1e12, 1e14)
    times = {(case.implementation, case.rows): t for case, t in read.times.items()}
    assert times == pytest.approx({("mosaic", 1): 5e-6, ("xla", 1): 9e-6, ("mosaic", 16): 6e-6})
