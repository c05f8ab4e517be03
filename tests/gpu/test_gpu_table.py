"""Tests the script that writes the tables of docs/gpu.md, on made-up figures."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.tools import gpu_table, program
from qlora_jax.gpu.kernel_rows import table
from qlora_jax.gpu.measured import GpuReport
from qlora_jax.kernels.select import EVERY

FUSED = {
    "gpu": "a100",
    "implementation": "triton",
    "rows": 16,
    "k": 4096,
    "n": 4096,
    "dtype": "bfloat16",
    "direction": "forward",
    "error": None,
    "floor_bytes": 100,
    "moved_bytes": 105,
    "kernels": [
        {
            "name": "k",
            "registers": 99,
            "shared_bytes": 12800,
            "launch": {"blocks": 1, "threads": 128, "shared": 12800},
            "blocks_per_core": 5,
            "main_loop": {"tensor": 4, "integer": 36},
            "main_loop_tensor_flop": 4 * 4096,
        }
    ],
    "seconds": {"bytes": 4e-6, "tensor": 1e-6, "issue": 5e-6, "total": 5e-6},
}
FIRST = FUSED | {
    "implementation": "xla",
    "seconds": {"total": 38.2e-6, "decode": 21.7e-6, "product": 16.5e-6},
}


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Ended:
    """Runs the script in this process, because importing it anew takes most of a test's time."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as streams:
        patch.setattr(sys, "argv", ["gpu_table", *arguments])
        streams.enter_context(contextlib.redirect_stdout(out))
        streams.enter_context(contextlib.redirect_stderr(err))
        with pytest.raises(SystemExit) as ended:
            program.run(gpu_table.main)
    return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def test_a_tensor_instruction_without_a_shape_is_listed_and_not_modelled(tmp_path: Path) -> None:
    kernel = FUSED["kernels"][0] | {"main_loop_tensor_flop": 0}
    figures = tmp_path / "gpu.json"
    figures.write_text(
        json.dumps([FIRST, FUSED | {"gpu": "b200", "kernels": [kernel], "seconds": {}}])
    )
    done = run("--only", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "b200" in line]
    assert len(lines) == 1
    assert lines[0].endswith("|  | 1.05 |")


def test_tables_go_between_the_markers(tmp_path: Path) -> None:
    figures, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    figures.write_text(json.dumps([FIRST, FUSED]))
    page.write_text("before\n<!-- gpu_table.py begins -->old<!-- gpu_table.py ends -->\nafter\n")
    done = run("--only", "--json", str(figures), "--write", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "Compiled, not run" in text
    # 5 blocks of 128 threads are 31% of 2048; 40 instructions are 10 for each of 4 HMMA.
    row = "| triton forward | a100 | 16 | 16x32 | 99 | 12.8 | 5 (31%) | 10.0 | 1.05 |"
    assert row in text
    assert "| forward | a100 | xla | 38.2 (21.7 + 16.5) |" in text
    assert "| forward | a100 | triton | **5 issue** |" in text
    assert run("--only", "--json", str(figures), "--write", str(page)).returncode == 0
    assert page.read_text() == text


def test_what_did_not_compile_fails(tmp_path: Path) -> None:
    figures = tmp_path / "gpu.json"
    figures.write_text(json.dumps([FUSED | {"error": "no such thing", "kernels": []}]))
    done = run("--only", "--json", str(figures))
    assert done.returncode == 1
    assert "no such thing" in done.stderr


def test_a_page_without_markers(tmp_path: Path) -> None:
    figures, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    figures.write_text("[]")
    page.write_text("nothing")
    done = run("--only", "--json", str(figures), "--write", str(page))
    assert done.returncode == 2
    assert "add the lines <!-- gpu_table.py begins -->" in done.stderr
    assert page.read_text() == "nothing"


def test_a_gpu_with_a_report_has_times_at_its_rates(tmp_path: Path, write_report) -> None:
    figures = tmp_path / "gpu.json"
    sheet = FUSED | {"gpu": "h100", "rows": 1}
    # These times are at the data sheet's rates: 3352.32 GB/s and 989.4 TFLOP/s.
    sheet["seconds"] = {"bytes": 10e-6, "tensor": 8e-6, "issue": 1e-6, "total": 10e-6}
    first = sheet | {"implementation": "xla"}
    first["seconds"] = sheet["seconds"] | {"decode": 5e-6, "product": 8e-6, "total": 13e-6}
    figures.write_text(json.dumps([first, sheet, FUSED | {"rows": 1}]))
    report = write_report({("xla", 1): 99, ("triton", 1): 12.34})
    done = run("--only", "--json", str(figures), "--reports", str(report.parent))
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.partition("Microseconds on NVIDIA H100 80GB HBM3")
    assert "| forward | h100 | triton | **10 bytes** |" in before
    assert after.startswith(" at its measured rates (and measured), W of 4096 x 4096:")
    # At the report's 3000 GB/s: 10 us x 3352.32 / 3000.
    assert "| forward | h100 | triton | **11.2 bytes; measured 12.3** |" in after
    assert "; measured 99 |" in after
    assert "a100" not in after
    without = run("--only", "--json", str(figures), "--reports", str(tmp_path / "none"))
    assert without.stdout.rstrip() == before.rstrip()


def test_rows_as_python(write_report) -> None:
    took = {("xla", 1): 20, ("mosaic", 1): 5, ("xla", 512): 30, ("mosaic", 512): 31}
    report = write_report({**took, ("xla", 2048): 30, ("mosaic", 2048): 29})
    done = run("--rows", "--reports", str(report.parent))
    assert done.returncode == 0, done.stderr
    assert "        (9, 0): (range(512), range(2048, EVERY)),\n" in done.stdout
    names: dict = {"Mapping": dict, "EVERY": EVERY}
    exec("from __future__ import annotations\n" + done.stdout, names)
    assert names["FUSED_ROWS"] == table([GpuReport(report)])
    report.write_text("{}")
    broken = run("--rows", "--reports", str(report.parent))
    assert broken.returncode == 2
    assert f"{report}: schema: " in broken.stderr
