"""`qlora-jax combine`: combines adapter folders into one folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.formats.peft import read_adapter

MODELS = Path(__file__).parent / "golden" / "models" / "llama"
ONE, TWO = MODELS / "peft_lora", MODELS / "peft_patterns"
RunCli = Callable[..., Any]


def effects(folder: Path) -> dict[str, np.ndarray]:
    """Returns scale · B·A of each module, from the files by PEFT's formulas: the reference."""
    tensors = load_file(folder / "adapter_model.safetensors")
    stored = read_adapter(folder)
    found = {}
    for path, adapter in stored.adapters.items():
        a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        found[path] = adapter.alpha / a.shape[0] * b.astype(np.float64) @ a.astype(np.float64)
    return found


def test_a_difference_is_written_for_peft(tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "sum"
    ended = run_cli("combine", out, "--adapter", f"1.5={ONE}", "--adapter", f"-0.5={TWO}")
    assert ended.code == 0, ended.err
    assert ended.out == f"{out}: 21 linears, rank 16\n"
    one, two, total = effects(ONE), effects(TWO), effects(out)
    assert total.keys() == one.keys() | two.keys()
    for path, effect in total.items():
        expected = 1.5 * one[path] - (0.5 * two[path] if path in two else 0)
        np.testing.assert_allclose(effect, expected, atol=1e-5)
    assert read_adapter(out).base_name == "llama"


def test_a_shorter_rank_names_its_error(tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "sum"
    terms = ["--adapter", f"1={ONE}", "--adapter=-1=" + str(TWO)]
    ended = run_cli("combine", out, *terms, "--rank", "8", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["rank"] == 8
    one, two, total = effects(ONE), effects(TWO), effects(out)
    exact = {p: e - two.get(p, 0) for p, e in one.items()}
    lost = sum(((exact[p] - total[p]) ** 2).sum() for p in exact)
    whole = sum((e**2).sum() for e in exact.values())
    assert 0.01 < report["error"] < 1
    assert report["error"] == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
    assert f"relative error {report['error']:.3g}" in ended.err


def test_what_cannot_be_added(tmp_path: Path, run_cli: RunCli) -> None:
    other = Path(shutil.copytree(ONE, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :100])
    save_file(tensors, other / "adapter_model.safetensors")
    for arguments, expected in {
        (): "--adapter is missing; give --adapter WEIGHT=DIR",
        ("--adapter", str(ONE)): "--adapter: must be WEIGHT=DIR, for example -0.5=DIR, not",
        ("--adapter", f"x={ONE}"): "--adapter: must be WEIGHT=DIR",
        ("--adapter", f"inf={ONE}"): "--adapter: must be WEIGHT=DIR",
        ("--adapter", "1=none"): "none: no such folder; give a folder in PEFT's format",
        ("--adapter", f"1={ONE}", "--rank", "0"): "--rank: must be a whole number of 1 or more",
        ("--adapter", f"1={ONE}", "--adapter", f"1={other}"): (
            "other: model.layers.0.mlp.down_proj is [100, 64] (in, out), but [128, 64] in an "
            "earlier adapter"
        ),
    }.items():
        ended = run_cli("combine", tmp_path / "out", *arguments)
        assert ended.code == 2
        assert expected in ended.err
        assert not (tmp_path / "out").exists()
