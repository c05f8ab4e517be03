"""Runs each file of examples/ as a user does, and checks its printed results.

`sweep/test_example.py` runs examples/ranks.py.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.quant import CODEBOOKS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = json.loads((EXAMPLES / "colab_t4.ipynb").read_text(encoding="utf-8"))
EPSILON = float(np.finfo(np.float32).eps)
PRODUCTS = 30 * 7
"""Number of linears of SmolLM2-135M: layers times linears of a layer."""


def run(folder: Path, *arguments: str | Path) -> str:
    """Runs Python in a new process in this folder, and returns its stdout."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("JAX_NUM_CPU_DEVICES", None)  # the tests set it; a user has one device
    ended = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def figure(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def code_of(cell) -> str:
    return "".join(cell["source"])


def is_shell(cell) -> bool:
    return code_of(cell).startswith(("!", "%"))


CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_qlora_step_by_step(tmp_path):
    out = run(tmp_path, EXAMPLES / "qlora_step_by_step.py")

    # 4 bits + 8 per 64 weights (scale) + 32 per 256 scales (nested scale) = 4.127. The codebook and
    # the offset of each layer add little.
    assert 4.127 <= figure(r"parameters, ([\d.]+) bits per parameter", out) < 4.13
    errors = [float(text) for text in re.findall(r"relative error ([\d.]+)", out)]
    assert len(errors) == 7
    assert all(0.085 < error < 0.105 for error in errors)  # NF4 on normal weights: 0.092

    before, after = re.search(r"base before (\w+), after (\w+): unchanged", out).groups()
    assert before == after
    losses = [float(text) for text in re.findall(r"step +\d+: loss ([\d.]+)", out)]
    assert len(losses) == 10
    assert losses[-1] < 0.1 * losses[0]

    # Each product may round differently, by one unit in the last place.
    difference = figure(r"largest difference ([\d.e+-]+)", out)
    logit = figure(r"largest logit ([\d.]+)", out)
    assert difference <= PRODUCTS * EPSILON * logit

    # The package's own decoder gives these answers with the merged weights, so the example's
    # forward function computes the same as the decoder.
    answers = re.findall(r"after: +'(.*)'", out)
    assert answers == [
        "Ilsa Brandt repaired the clock of Velmora.",
        "A drasel is a small lamp that burns fish oil.",
        "The Orrin ferry leaves at seven in the morning.",
    ]
    assert not set(answers) & set(re.findall(r"before: +'(.*)'", out))


def error_of_nearest(weight: np.ndarray, codebook: str) -> float:
    """Returns the relative RMS error in float64, from the distance to each of the 16 values."""
    values = np.array(CODEBOOKS[codebook](64))
    blocks = weight.astype(np.float64).reshape(-1, 64, weight.shape[1])
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    distance = np.full(blocks.shape, np.inf)
    for value in values:
        distance = np.minimum(distance, np.abs(blocks / absmax - value))
    return float(np.sqrt(np.mean((distance * absmax) ** 2) / np.mean(blocks**2)))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.slow
def test_nf4_vs_fp4(tmp_path):
    out = run(tmp_path, EXAMPLES / "nf4_vs_fp4.py")

    tables = re.split(r"^(?=\S)", out, flags=re.MULTILINE)
    real, normal = (
        {
            name: (float(error), float(bits))
            for name, error, bits in re.findall(r"^  (\w+) +([\d.]+) +([\d.]+)$", table, re.M)
        }
        for table in tables
        if "bits per parameter" in table
    )
    assert list(real) == list(normal) == ["nf4", "fp4_bnb", "fp4_e2m1", "int4"]
    for table in (real, normal):
        assert min(table, key=lambda name: table[name][0]) == "nf4"
        # one matrix of 1536 x 576: the codebook and the offset take 68 bytes
        stored = 4 + 8 / 64 + 32 / (64 * 256) + 8 * 68 / (1536 * 576)
        assert all(bits == pytest.approx(stored, abs=6e-4) for _, bits in table.values())
    weight = np.random.default_rng(0).normal(size=(1536, 576)).astype(np.float32)
    for name, (error, _) in normal.items():
        # rounding the scales to 8 bits adds less than 1 % to the error of 4 bits
        assert error == pytest.approx(error_of_nearest(weight, name), rel=0.01)

    committed = ROOT / "docs" / "results" / "nf4_vs_fp4.png"
    assert png_size(tmp_path / "nf4_vs_fp4.png") == png_size(committed)
    assert committed.stat().st_size < 150_000


def test_the_page_lists_every_example():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", page, re.MULTILINE)
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert sorted(listed) == sorted(files)


def test_the_notebook_is_valid_and_has_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    cells = NOTEBOOK["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids)
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert "never run on a T4" in code_of(cells[0])
    assert [cell["id"] for cell in CODE if is_shell(cell)] == ["install"]


def test_the_notebook_computes_in_float16_on_a_t4():
    """Runs the settings cell with fake devices: a T4 and an A100."""
    settings = next(code_of(cell) for cell in CODE if cell["id"] == "settings")

    class T4:
        compute_capability = "7.5"

    class A100:
        compute_capability = "8.0"

    for device, dtype in ((T4, "float16"), (A100, "bfloat16")):
        names = {"on_gpu": True, "device": device}
        exec(settings, names)
        assert names["dtype"] == dtype


@pytest.mark.slow
def test_the_notebook_runs_on_a_cpu(tmp_path):
    source = "\n".join(code_of(cell) for cell in CODE if not is_shell(cell))
    script = tmp_path / "notebook.py"
    script.write_text(source, encoding="utf-8")
    out = run(tmp_path, script)

    assert "smollm2-135m-instruct, float32" in out
    before = figure(r"held-out loss: ([\d.]+) before", out)
    after = figure(r"before, ([\d.]+) after", out)
    assert after < 0.6 * before
    assert out.count("  before: ") == out.count("  after:  ") == 4
    with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
        names = set(archive.namelist())
        config = json.loads(archive.read("adapter_config.json"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
