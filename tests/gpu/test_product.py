"""Tests compiling products in separate processes, and the rules that refuse a program."""

import sys

import jax
import pytest

from qlora_jax.gpu import product
from qlora_jax.gpu.case import DIRECTIONS, GpuProduct
from qlora_jax.gpu.product import broken_rule, compile_all
from qlora_jax.gpu.sass import Launch, SassKernel
from qlora_jax.kernels.select import module_of
from qlora_jax.runtime.errors import UserError

CASE = GpuProduct("a6000", "triton", 16, 128, 128, "bfloat16", "forward")
HLO = 'custom_call_target="__gpu$xla.gpu.triton"'

WORKER = """
import json, os, sys
for line in sys.stdin:
    case = json.loads(line)
    if case[2] == 2:
        print("ran out of patience", file=sys.stderr, flush=True)
        os.abort()
    print(json.dumps({"rows": case[2], "error": None, "pid": os.getpid()}), flush=True)
"""


def test_a_compiler_that_aborts_takes_one_case_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "has_plugin", lambda: True)
    monkeypatch.setattr(product, "COMMAND", [sys.executable, "-c", WORKER])
    cases = [CASE._replace(rows=rows) for rows in (1, 2, 3)] + [CASE._replace(gpu="h100")]
    records = list(compile_all(cases))
    assert [record["rows"] for record in records] == [1, 2, 3, 16]
    assert records[1]["error"].startswith("the compiler's process ended with -6: ran out of")
    assert not any(records[i]["error"] for i in (0, 2, 3))
    assert len({records[i]["pid"] for i in (0, 2, 3)}) == 3


def test_without_the_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "has_plugin", lambda: False)
    with pytest.raises(UserError, match="not installed; run make gpu-check"):
        next(compile_all([CASE]))


@pytest.mark.parametrize("name", ["xla", "triton", "mosaic"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_case_is_compiled_from_the_module_of_its_implementation(
    monkeypatch: pytest.MonkeyPatch, name: str, direction: str
) -> None:
    if name == "mosaic" and jax.__version_info__ < (0, 11):
        pytest.skip("mosaic needs jax 0.11")
    asked = []

    def compile_for(gpu: str, function: object, *arguments: object, options: object) -> None:
        asked.append(function)
        raise RuntimeError("that is enough")

    monkeypatch.setattr(product, "compile_for", compile_for)
    record = product.describe(CASE._replace(implementation=name, direction=direction))
    assert record["error"] == "RuntimeError: that is enough"
    assert asked == [getattr(module_of(name), direction)]


def kernel(spill: int = 0, shared: int = 1000, launch: bool = True) -> SassKernel:
    return SassKernel("k", "sm_86", 64, spill, 24, Launch(1, 128, shared) if launch else None, ())


@pytest.mark.parametrize(
    ("hlo", "temp", "kernels", "error"),
    [
        (HLO, 0, [kernel()], None),
        ("no kernel", 0, [kernel()], "holds no kernel"),
        (HLO, 0, [], "holds no kernel"),
        (HLO, 0, [kernel(launch=False)], "holds no kernel"),
        (HLO, 128 * 128, [kernel()], "16384 bytes of temporaries beside a weight of 8192 bytes"),
        (HLO, 0, [kernel(), kernel(spill=8)], "spilling 8 bytes"),
        # A block on an a6000 has at most 101376 bytes.
        (HLO, 0, [kernel(shared=101376 - 24)], None),
        (HLO, 0, [kernel(shared=101376)], "101400 bytes of shared memory, the limit is 101376"),
    ],
)
def test_rules(hlo: str, temp: int, kernels: list[SassKernel], error: str | None) -> None:
    found = broken_rule(CASE, hlo, temp, kernels)
    assert found is None if error is None else error in (found or "")


def test_equal_mosaic_kernels_are_dumped_once_and_found_again() -> None:
    def mosaic(name: str) -> SassKernel:
        return SassKernel(f"{name}_mosaic_gpu_kernel", "sm_80", 64, 0, 0, Launch(1, 128, 0), ())

    def program(key: str) -> str:
        return f'custom-call(), backend_config={{kernel_hash = "{key}"}}'

    one, other, pad = mosaic("one"), mosaic("other"), kernel()
    first, second = 'a\\"1', "a"
    assert product.with_earlier(program(first), [one]) == [one]
    assert product.with_earlier(program(second), [other]) == [other]
    assert product.with_earlier(program(first), [pad]) == [pad, one]
    assert product.with_earlier(program(second), []) == [other]
    assert product.with_earlier("no hash", [pad]) == [pad]
    assert product.with_earlier(program("new"), [pad]) == [pad]
