"""Tests the options and the messages of `qlora-jax bench gpu`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.bench.gpu.parts import PARTS
from qlora_jax.bench.gpu.record import Recorder
from qlora_jax.runtime import device


def test_the_list(run_cli: Callable[..., Any]) -> None:
    ended = run_cli("bench", "gpu", "--list", "--skip", "peers")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == [
        part.name for part in PARTS if part.name != "peers"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nothing"), "nothing: no such part; there are: ceilings,"),
        ((), "no NVIDIA GPU is here; --rehearse runs tiny shapes on the CPU instead"),
        (("--lines", "absent.jsonl"), "absent.jsonl: no such file"),
        (("--budget", "0"), "--budget"),
    ],
)
def test_bad_input_is_one_line(
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: False)
    monkeypatch.chdir(tmp_path)
    ended = run_cli("bench", "gpu", *arguments)
    assert ended.code == 2
    assert message in ended.message
    assert not list(tmp_path.iterdir())


def test_a_report_of_several_calls(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    head = Recorder(first, "ceilings")
    for name, value in {"device": "Made Up", "backend": "gpu", "versions": {}}.items():
        head.fact(name, value)
    head.end(1.0, "ok")
    Recorder(second, "products").check("a", True)
    Recorder(second, "products").end(2.0, "ok")
    output = tmp_path / "report"
    ended = run_cli("bench", "gpu", "--lines", str(first), str(second), "--output", str(output))
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == "2 parts run, 0 failed"
    report = json.loads((output / "made-up.json").read_text())
    assert [part["seconds"] for part in report["parts"]] == [1.0, 2.0]
    assert str(tmp_path) not in json.dumps(report)
    Recorder(second, "products").check("b", False)
    ended = run_cli("bench", "gpu", "--lines", str(first), str(second), "--output", str(output))
    assert (ended.code, ended.message) == (1, "qlora-jax: 2 parts run, 1 failed")
    assert (output / "made-up.md").exists()


def test_lines_without_a_device(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    Recorder(tmp_path / "a", "products").check("a", True)
    ended = run_cli("bench", "gpu", "--lines", str(tmp_path / "a"), "--output", str(tmp_path / "b"))
    assert ended.code == 2
    assert "holds no device; run the part ceilings first" in ended.message
    assert not (tmp_path / "b").exists()
