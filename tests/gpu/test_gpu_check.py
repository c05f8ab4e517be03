"""Tests `make gpu-check`: its cases, its output and its failures."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

from experiments.tools import gpu_check
from qlora_jax.bench.gpu.compile_check import CompileOutcome
from qlora_jax.gpu.case import GpuProduct
from qlora_jax.gpu.compile import NO_SPILLS, environment, has_plugin
from qlora_jax.gpu.product import compile_all
from qlora_jax.kernels.select import FUSED

ROOT = Path(__file__).parents[2]
WITHOUT = "compile-only GPU packages absent: make gpu-check"
FIVE = {"a100", "a6000", "b200", "h100", "rtx4090"}


@pytest.fixture
def script() -> ModuleType:
    return gpu_check


@pytest.fixture
def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], str]]:
    """Returns a function that checks the kernels with made-up outcomes: case to error or None."""

    def run(outcome: Callable[[GpuProduct], str | None], keep: Callable[[GpuProduct], bool] = bool):
        def compiled(cases):
            return ({**c._asdict(), "error": outcome(c)} for c in cases if keep(c))

        monkeypatch.setattr(script, "compile_all", compiled)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "kernels"])
        code = script.main()
        out, err = capsys.readouterr()
        progress = re.compile(r"kernels  \d+/")
        errors = [line for line in err.splitlines() if not progress.match(line)]
        return code, out.splitlines(), "\n".join(errors)

    return run


def test_the_cases_cover_each_kernel(script: ModuleType) -> None:
    cases = script.cases()
    assert len(cases) == len(set(cases))
    triton = [c for c in cases if c.implementation == "triton"]
    assert {c.gpu for c in triton} == FIVE
    assert len(triton) == 24 * 5
    mosaic = [c for c in cases if c.implementation == "mosaic"]
    assert len(mosaic) == (16 * 5 if jax.__version_info__ >= (0, 11) else 0)
    rest = [c for c in cases if c.implementation == "xla"]
    assert {(c.gpu, c.dtype, c.direction) for c in rest} == {
        ("t4", "float16", "forward"),
        ("t4", "float16", "backward"),
    }
    assert {c.implementation for c in cases} <= {*FUSED, "xla"}


def test_the_last_line_and_the_exit_code(run: Any) -> None:
    code, lines, err = run(lambda case: None, lambda case: case.implementation != "mosaic")
    assert (code, lines[-1], err) == (0, "24 kernels x 5 GPUs compiled, 0 spilled", "")
    assert lines[0] == "t4: 8 products of float16 without a product of float32"


def test_a_spill_fails(run: Any) -> None:
    code, lines, err = run(
        lambda c: "k: spilling 8 bytes" if c.gpu == "a100" and c.rows == 1 else None,
        lambda case: case.implementation != "mosaic",
    )
    assert (code, lines[-1]) == (1, "22.8 kernels x 5 GPUs compiled, 6 spilled")
    assert "a100, triton, 1 rows, 4096x4096, float16, forward: k: spilling 8 bytes" in err


def test_it_fails_when_it_compiled_none(run: Any) -> None:
    code, lines, _ = run(lambda case: None, lambda case: case.implementation == "xla")
    assert (code, lines[-1]) == (1, "0 kernels x 0 GPUs compiled, 0 spilled")
    assert run(lambda case: "no", lambda case: case.gpu == "h100")[0] == 1


@pytest.mark.parametrize(
    ("kernel", "program", "code"),
    [(None, None, 0), (None, "INTERNAL: no", 1), ("spilling", None, 1), ("spilling", "no", 1)],
)
def test_the_last_lines_and_the_exit_code_of_both_checks(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: str | None,
    program: str | None,
    code: int,
) -> None:
    def compiled(cases):
        return ({**c._asdict(), "error": kernel} for c in cases if c.gpu == "h100")

    def programs(tasks, tell):
        return [CompileOutcome(gpu, "steps", "7B", program) for gpu in ("h100", "a100")]

    monkeypatch.setattr(script, "compile_all", compiled)
    monkeypatch.setattr(script.compile_check, "tasks", lambda: [])
    monkeypatch.setattr(script.compile_check, "compile_all", programs)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert script.main() == code
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert ("compiled, 0 spilled" in out) == (kernel is None)
    assert any("kernels x 1 GPUs compiled" in line for line in lines)
    failed = 2 if program else 0
    end = f"{1 - failed / 2:g} programs of bench gpu x 2 GPUs compiled, {failed} failed"
    assert lines[-1] == end
    assert ("a100, steps, 7B: INTERNAL: no" in err) == (program == "INTERNAL: no")


def test_a_check_without_programs_fails(script: ModuleType, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(script.compile_check, "tasks", lambda: [])
    monkeypatch.setattr(script.compile_check, "compile_all", lambda tasks, tell: [])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "programs"])
    assert script.main() == 1


@pytest.mark.skipif(has_plugin(), reason="the compile-only GPU packages are here")
def test_without_the_compiler_the_remedy_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", gpu_check.__name__],
        env=environment(NO_SPILLS) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "the compile-only GPU packages are not installed; run make gpu-check"


@pytest.mark.skipif(not has_plugin(), reason=WITHOUT)
def test_every_kernel_compiles_for_every_gpu_without_spilling() -> None:
    done = subprocess.run(
        [sys.executable, "-m", gpu_check.__name__, "--json", "--only", "kernels"],
        env=environment(NO_SPILLS) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["kernels"]
    assert {r["gpu"] for r in records if r["implementation"] in FUSED} == FIVE
    for r in records:
        assert r["kernels"], r
        assert all(kernel["spill_bytes"] == 0 for kernel in r["kernels"]), r


@pytest.mark.skipif(not has_plugin(), reason=WITHOUT)
def test_a_t4_that_is_given_bfloat16_multiplies_in_float32() -> None:
    """The check must find bfloat16, which a T4 lacks; otherwise passing float16 proves nothing."""
    case = GpuProduct("t4", "xla", 32, 256, 256, "bfloat16", "forward")
    (record,) = compile_all([case])
    assert record["error"].startswith("products of bfloat16 are done in float32")
    (record,) = compile_all([case._replace(dtype="float16")])
    assert record["error"] is None
