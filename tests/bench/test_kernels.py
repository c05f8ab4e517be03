"""Tests the timed cases: the right function, the right inputs, each call made once."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from qlora_jax.bench import cases, jax_timing, kernels, measure
from qlora_jax.bench.cases import OperationCase
from qlora_jax.bench.options import KernelOptions, from_tree, to_tree
from qlora_jax.gpu.compile import NO_SPILLS, environment, has_plugin
from qlora_jax.quant import QTensor, dequantize, nbytes, quantize
from qlora_jax.runtime.errors import UserError

TINY = KernelOptions(((128, 64),), (1, 3), ("float32",), samples=2)


def test_names_are_unique_and_say_what_is_timed() -> None:
    names = [case.name for case in cases.cases(cases.settle(KernelOptions(), "gpu"))]
    assert len(names) == len(set(names)) == 3 * 4 + 3 * 2 * 7
    assert (
        OperationCase("forward", 4096, 11008, "bfloat16", 16).name
        == "forward 4096x11008, M=16, bfloat16"
    )
    assert OperationCase("quantize", 64, 64, "float32", double=False).name.endswith(
        ", plain scales"
    )


def test_operations_can_be_chosen() -> None:
    chosen = list(cases.cases(cases.settle(KernelOptions(operations=("backward",)), "cpu")))
    assert {case.operation for case in chosen} == {"backward"}
    assert len(chosen) == 2 * 4


def test_the_device_settles_only_what_was_left_open() -> None:
    settled = cases.settle(KernelOptions(rows=(7,)), "gpu")
    assert settled.rows == (7,)
    assert settled.shapes == ((4096, 4096), (4096, 11008), (8192, 28672))
    assert settled.device == "gpu"
    assert cases.settle(KernelOptions(), "cpu").rows == (1, 16, 512, 2048)


@pytest.mark.parametrize(
    ("case", "nbytes"),
    [
        (OperationCase("forward", 4096, 4096, "bfloat16", 1), 2**23 + 2**18 + 2**12 + 2 * 2 * 4096),
        (OperationCase("backward", 4096, 4096, "bfloat16", 2048), 2**23 + 2**18 + 2**12 + 2**25),
        (OperationCase("dequantize", 4096, 4096, "float32"), 2**23 + 2**18 + 2**12 + 2**26),
        (OperationCase("quantize", 4096, 4096, "float32", double=False), 2**23 + 2**20 + 2**26),
    ],
)
def test_inputs_in_turn_are_beyond_any_cache(case: OperationCase, nbytes: int) -> None:
    assert case.nbytes() == nbytes
    assert (case.copies - 1) * nbytes < cases.BEYOND_CACHES <= case.copies * nbytes


def test_huge_and_tiny_inputs_have_a_few_copies() -> None:
    assert OperationCase("forward", 4096, 11008, "float32", 2**16).copies == 2
    assert OperationCase("forward", 64, 64, "float32", 1).copies == cases.MOST_COPIES


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("operation", ["forward", "backward", "dequantize"])
def test_bytes_are_those_of_operands_and_result(operation: str, double: bool) -> None:
    case = OperationCase(
        operation, 512, 256, "bfloat16", 3 if operation != "dequantize" else 0, double
    )
    arguments = kernels.arguments(case)
    result = jax.eval_shape(kernels.operation(case, None), *arguments)
    # The count leaves out the codebook (64 bytes) and the offset (4 bytes).
    small = 64 + 4 * double
    assert case.nbytes() == nbytes((arguments, result)) - small
    if case.rows:
        plain = kernels.arguments(case, quantized=False)
        assert case.nbytes(quantized=False) == nbytes((plain, result))


def test_a_figure_of_a_case_has_what_its_time_amounts_to() -> None:
    figure = cases.case_figure(
        OperationCase("forward", 4096, 4096, "bfloat16", 2048), [1e-3, 3e-3, 2e-3]
    )
    assert (figure["value"], figure["unit"], figure["samples"]) == (2, "ms", [1, 3, 2])
    # In 2 ms: 2 * 2048 * 4096**2 flop, and bytes of codes 2**23, scales 2**18, nested scales 2**12,
    # x and y 2**25.
    assert figure["TFLOP/s"] == pytest.approx(34.36, rel=1e-3)
    assert figure["GB/s"] == pytest.approx(21.11, rel=1e-3)
    assert "TFLOP/s" not in cases.case_figure(OperationCase("dequantize", 64, 64, "float32"), [1.0])


@pytest.mark.parametrize("quantized", [True, False])
def test_products(quantized: bool) -> None:
    k, n, m = 128, 64, 3
    forward, backward = (OperationCase(o, k, n, "float32", m) for o in ("forward", "backward"))
    x, w = kernels.arguments(forward, quantized)
    assert isinstance(w, QTensor) == quantized
    dense = np.asarray(dequantize(w) if isinstance(w, QTensor) else w, np.float64)
    y = jax.jit(kernels.operation(forward, None))(x, w)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ dense, rtol=1e-5, atol=1e-4)
    g, w = kernels.arguments(backward, quantized)
    assert g.shape == (m, n)
    dx = jax.jit(kernels.operation(backward, None))(g, w)
    np.testing.assert_allclose(dx, np.asarray(g, np.float64) @ dense.T, rtol=1e-5, atol=1e-4)


def test_the_backward_case_multiplies_once() -> None:
    case = OperationCase("backward", 128, 64, "float32", 3)
    program = jax.jit(kernels.operation(case, None)).lower(*kernels.arguments(case))
    assert program.compile().as_text().count(" dot(") == 1


@pytest.mark.parametrize("double", [True, False])
def test_quantize_and_dequantize(double: bool) -> None:
    case = OperationCase("quantize", 128, 64, "float32", double=double)
    q = kernels.operation(case, None)(*kernels.arguments(case))
    assert q.double_quant == double
    assert q.block_size == 64
    expected = quantize(case.weight(), "nf4", 64, double)
    np.testing.assert_array_equal(q.codes, expected.codes)
    case = OperationCase("dequantize", 128, 64, "bfloat16", double=double)
    (held,) = kernels.arguments(case)
    assert held.double_quant == double
    w = kernels.operation(case, None)(held)
    assert w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(w, dequantize(expected, jnp.bfloat16))


def test_calls_take_their_inputs_in_turn() -> None:
    seen: list[int] = []
    times = jax_timing.one_by_one(lambda i: seen.append(i), [(0,), (1,), (2,)], samples=5)
    assert len(times) == 5
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    assert seen[:3] != seen[1:4]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("operation", ["quantize", "forward", "backward"])
def test_inputs_are_normal_numbers_on_any_device(
    backend: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    case = OperationCase(operation, 128, 64, "bfloat16", 300 * (operation != "quantize"))
    w, x = jax_timing.drawn(case)
    assert (w.shape, w.dtype) == ((128, 64), jnp.float32)
    assert (x.shape, x.dtype) == (case.operand_shape, jnp.float32)
    assert case.operand_shape[1] == (64 if operation == "backward" else 128)
    for values in (w, x) if x.size else (w,):
        assert abs(float(values.mean())) < 0.05
        assert float(values.std()) == pytest.approx(1, abs=0.05)
    if backend == "cpu":
        np.testing.assert_array_equal(w, case.weight())
    # The weight and the operand must have different random numbers.
    assert not x.size or abs(float(w[0, 0]) - float(x[0, 0])) > 1e-6


def test_copies_share_no_buffer() -> None:
    sets = jax_timing.copies(kernels.arguments(OperationCase("forward", 64, 64, "float32", 1)), 3)
    leaves = jax.tree.leaves(sets)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_one_program_goes_over_all_inputs_in_every_pass() -> None:
    """The number of products that run must equal the divisor of the measured time."""
    ran: list[float] = []

    def function(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: ran.append(float(x)), x)
        return 2 * x

    sets = [(jnp.float32(i),) for i in range(3)]
    program = jax_timing.compiled(function, sets)
    for passes in (4, 1):
        results = program(np.int32(passes), sets)
        jax.effects_barrier()
        assert sorted(ran) == sorted([0.0, 1.0, 2.0] * passes * jax_timing.ROUNDS)
        assert [float(r) for r in results] == [0, 2, 4]
        ran.clear()
    assert [float(r) for r in program(np.int32(0), sets)] == [0, 0, 0]
    assert ran == []


@pytest.mark.parametrize("count", [1, 3])
def test_seconds_within_a_program_are_those_of_one_call(count: int) -> None:
    def wait(x: np.ndarray) -> np.ndarray:
        time.sleep(0.002)
        return x

    def function(x: jax.Array) -> jax.Array:
        return io_callback(wait, x, x)

    sets = [(jnp.float32(i),) for i in range(count)]
    times = jax_timing.program_seconds(jax_timing.compiled(function, sets), sets, samples=3)
    assert len(times) == 3
    # Only a lower bound: a sleep is never shorter, less the dispatch, but a busy machine
    # lengthens it.
    assert min(times) > 0.9 * 0.002


def test_as_many_passes_as_a_sample_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake clock: a call takes 3 us and a dispatch 70 us."""
    asked: list[int] = []

    def timed(call: Callable[[], Any]) -> float:
        call()
        return 70e-6 + asked[-1] * jax_timing.ROUNDS * 2 * 3e-6

    def program(passes: np.int32, sets: Any) -> None:
        asked.append(int(passes))

    monkeypatch.setattr(measure, "timed", timed)
    times = jax_timing.program_seconds(program, [(), ()], samples=4)  # type: ignore[arg-type]
    assert times == pytest.approx([3e-6] * 4)
    assert len(set(asked[-5:])) == 1
    assert asked[-1] * jax_timing.ROUNDS * 2 * 3e-6 == pytest.approx(jax_timing.SAMPLE, rel=0.5)


@pytest.mark.skipif(not has_plugin(), reason="needs the compile-only GPU packages")
@pytest.mark.parametrize("implementation", ["xla", None])
def test_on_a_gpu_every_pass_is_computed(implementation: str | None) -> None:
    """XLA must not move a product or a decoding out of the loop, and must not copy a weight."""
    program = f"""
import functools, jax, jax.numpy as jnp
from qlora_jax.bench import jax_timing, kernels
from qlora_jax.bench.cases import OperationCase
from qlora_jax.gpu.compile import compile_for
from qlora_jax.quant import quantize
x = jax.ShapeDtypeStruct((16, 1024), jnp.bfloat16)
w = jax.ShapeDtypeStruct((1024, 2048), jnp.float32)
w = jax.eval_shape(quantize, w) if {implementation!r} else w
case = OperationCase("forward", 1024, 2048, "bfloat16", 16)
function = kernels.operation(case, {implementation!r})
over_all = functools.partial(jax_timing.over_all, function)
passes = jax.ShapeDtypeStruct((), jnp.int32)
print(compile_for("a100", over_all, passes, [(x, w)] * 3).as_text())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(NO_SPILLS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bodies = re.findall(r"body=%?([\w.-]+)", done.stdout)
    parts = {
        part.split()[0].lstrip("%"): part for part in done.stdout.split("\n\n") if part.strip()
    }
    gemm = re.compile(r"gemm_fusion|__cublas|__triton_gemm")
    products = [set(re.findall(r"%(\S*gemm_fusion\S*) = ", parts[body])) for body in bodies]
    assert sorted(map(len, products)) == [0, 3]  # the outer loop, then the inner loop
    assert not gemm.search(parts["ENTRY"])
    assert "[1024,2048]" not in "".join(re.findall(r".* = .*copy\(.*", done.stdout))


def test_report() -> None:
    report = kernels.run(TINY)
    settled = from_tree("kernels", report["options"])
    assert settled == cases.settle(TINY, jax.default_backend())
    expected = list(cases.cases(settled))
    assert list(report["figures"]) == [case.name for case in expected]
    for case in expected:
        figure = report["figures"][case.name]
        assert OperationCase(**figure["case"]) == case
        assert figure["unit"] == "ms"
        assert len(figure["samples"]) == 2
        assert figure["value"] == pytest.approx(np.mean(figure["samples"]), rel=1e-3)
    products = {case.name for case in expected if case.rows}
    assert report["variants"][kernels.UNQUANTIZED].keys() == products


def test_another_device_is_refused() -> None:
    with pytest.raises(UserError, match="--device tpu: jax runs on"):
        kernels.run(KernelOptions(device="tpu"))


def test_an_implementation_that_is_not_here_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "variants", lambda case, _: ["", "triton"][: 1 + bool(case.rows)])
    report: dict[str, Any] = kernels.run(TINY)
    assert report["variants"] == {}
    if jax.default_backend() == "cpu":
        assert any(note.startswith("triton, float32: cannot run (") for note in report["notes"])


def test_options_survive_json() -> None:
    assert from_tree("kernels", json.loads(json.dumps(to_tree(TINY)))) == TINY
    with pytest.raises(UserError, match="'speed' is no benchmark; there are: kernels, step"):
        from_tree("speed", {})
