"""Tests parts in separate processes: time limits, crashes and missing results."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.bench.gpu import ceilings, conduct, parts, record, report
from qlora_jax.bench.gpu.lane import FULL, REHEARSAL, PartContext
from qlora_jax.bench.gpu.parts import PARTS, BenchPart
from qlora_jax.runtime.errors import UserError

HERE = Path(__file__).parent
PART = BenchPart("ceilings", 5, 1, "made up")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Returns a function that runs one fake part and returns its lines."""
    monkeypatch.setattr(conduct, "MODULE", "fake_part")
    path = f"{HERE}{os.pathsep}{HERE.parents[2]}"
    monkeypatch.setenv("PYTHONPATH", path)

    def run(what: str, part: BenchPart = PART, budget: float = 60) -> list[dict[str, Any]]:
        monkeypatch.setenv("FAKE_PART", what)
        conduct.run(conduct.BenchRequest([part], FULL, budget, tmp_path), lambda line: None)
        return list(record.read([tmp_path / conduct.LINES]))

    return run


def absent(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {line["name"]: line["reason"] for line in lines if line["kind"] == "absent"}


def outcome(lines: list[dict[str, Any]]) -> str:
    (end,) = (line["outcome"] for line in lines if line["kind"] == "end")
    return end


def test_a_part_that_tells_everything(run: Any) -> None:
    lines = run("all")
    assert outcome(lines) == "ok"
    assert set(absent(lines).values()) == {"a reason"}


def test_what_is_declared_and_not_told_fails(run: Any) -> None:
    lines = run("something")
    assert outcome(lines).startswith("failed: declared results that were not recorded: to pinned")
    assert report.failed(
        {"checks": [], "absent": [], "parts": [{"name": "ceilings", "outcome": outcome(lines)}]}
    )


@pytest.mark.slow
def test_a_crash_is_the_reason_without_folders(run: Any) -> None:
    lines = run("crash")
    assert outcome(lines) == "failed with code 1: secret.py: boom"
    assert absent(lines)["dispatch"] == outcome(lines)
    assert "copy" not in absent(lines)


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_all_that_it_started(run: Any) -> None:
    began = time.monotonic()
    lines = run("hang", PART._replace(limit=3))
    assert time.monotonic() - began < 30
    assert outcome(lines) == "ended after its 3 s"
    (pid,) = (line["value"] for line in lines if line["kind"] == "fact")
    for _ in range(100):  # a process takes a moment to end after the signal
        if ended(pid):
            break
        time.sleep(0.1)
    assert ended(pid)


def test_a_case_that_hangs_costs_that_case_alone(run: Any) -> None:
    lines = run("one case hangs", PART._replace(limit=50))
    assert outcome(lines) == "ok"
    assert absent(lines) == {
        "matmul": "failed: the process hung and was ended",
        "from pinned host memory": "a reason",
    }
    figures = [line["name"] for line in lines if line["kind"] == "figure"]
    assert figures == ["copy", "to pinned host memory", "copy", "dispatch"]
    made = report.build(lines, "a command")
    assert report.failed(made) == ["ceilings"]


@pytest.mark.slow
def test_a_part_that_always_dies_is_given_up(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct, "PROCESSES", 2)
    lines = run("every case dies", PART._replace(limit=50))
    assert outcome(lines) == "failed with code 1: dead"
    errors = [line["name"] for line in lines if line.get("error")]
    assert errors == ["to pinned host memory", "from pinned host memory"]
    assert set(absent(lines)) == set(ceilings.names(FULL)) - {"copy"}


def ended(pid: int) -> bool:
    """Tells whether a process no longer exists or is a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_without_time_a_part_is_left_out(run: Any) -> None:
    lines = run("all", PART._replace(least=100), budget=50)
    assert outcome(lines) == "left out: 50 s were left"
    assert set(absent(lines)) == set(ceilings.names(FULL))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot be written"):
        conduct.run(conduct.BenchRequest([PART], FULL, 1, file / "x"), print)


def test_flags_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    part = PART._replace(flags="--b=2")
    assert conduct.environment(part, FULL)["XLA_FLAGS"] == "--a=1 --b=2"
    assert conduct.environment(part, REHEARSAL)["XLA_FLAGS"] == "--a=1"
    assert conduct.environment(part, REHEARSAL)["JAX_PLATFORMS"] == "cpu"


def test_the_parts() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert part.least <= part.limit
        for scale in (FULL, REHEARSAL):
            names = part.module.names(scale)
            assert names
            assert len(set(names)) == len(names), part.name
    assert [p.name for p in parts.chosen(("times", "steps"), ("steps",))] == ["times"]


def test_an_error_of_one_case_is_its_reason_and_fails_the_part(tmp_path: Path) -> None:
    lane = PartContext(record.Recorder(tmp_path / "lines", "p"), REHEARSAL, time.monotonic() + 9)
    lane.record.figure("a", "s", 1.0)
    with lane.guard("a", "b"):
        raise ValueError("no\nmore")
    with lane.guard("c"):
        raise RuntimeError("RESOURCE_EXHAUSTED: 5 GiB")
    with pytest.raises(RuntimeError), lane.guard("d"):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
    lines = [line for line in record.read([tmp_path / "lines"]) if line["kind"] == "absent"]
    told = {line["name"]: (line["reason"], line.get("error", False)) for line in lines}
    assert told["b"] == ("ValueError: no", True)
    assert told["c"] == ("RuntimeError: RESOURCE_EXHAUSTED: 5 GiB", False)
    assert told["d"][1]
    assert "a" not in told
    assert not lane.due(99, "e")
    assert lane.due(1, "f")
    told = dataclasses.replace(lane, told=["f"])
    assert told.due(1, "f", "g")
    assert not told.due(1, "f")
