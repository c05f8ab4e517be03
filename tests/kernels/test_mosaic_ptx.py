"""The Mosaic kernels, compiled for sm_80 and executed by a PTX emulator.

The compiled code includes swizzles of shared memory, asynchronous copies, ldmatrix, look-ups and
fragments of the tensor cores. The emulator is an independent reference: it follows NVIDIA's manual
alone. It reports races, reads of memory that was never written, and accesses out of bounds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.gpu.compile import has_plugin
from qlora_jax.quant import CODEBOOKS, QLayer, QTensor, quantize

if jax.__version_info__ < (0, 11):
    pytest.skip("Mosaic GPU kernels need jax 0.11 (Python 3.12)", allow_module_level=True)
if not has_plugin():
    pytest.skip("compile-only GPU packages absent: make gpu-check", allow_module_level=True)

import ptx_compile
from plain_mosaic import rounded_weight

from qlora_jax.kernels.mosaic import kernel as mosaic

EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
CASES = [
    # rows, K, N, direction, dtype, block size, double quantization, codebook
    (1, 512, 64, "forward", "bfloat16", 64, True, "nf4"),
    (16, 1280, 64, "forward", "float16", 32, True, "fp4_bnb"),
    (5, 256, 128, "forward", "bfloat16", 4096, False, "lloyd"),
    (16, 64, 1280, "backward", "bfloat16", 64, True, "nf4"),
    (3, 128, 256, "backward", "float16", 32, False, "int4"),
    (20, 192, 64, "forward", "bfloat16", 32, True, "af4"),
    (20, 64, 448, "backward", "bfloat16", 64, True, "nf4"),
    (64, 448, 128, "forward", "float16", 64, True, "nf4"),
    (40, 128, 192, "backward", "bfloat16", 32, True, "fp4_e2m1"),
    (130, 256, 128, "forward", "bfloat16", 128, True, "nf4"),
    (130, 128, 320, "backward", "float16", 64, True, "fp4_e3m0"),
    (4, 4352, 64, "forward", "bfloat16", 64, True, "nf4"),  # two parts, of 9 and 8 steps
    (20, 64, 1024, "backward", "bfloat16", 64, True, "nf4"),  # two equal parts
    (17, 72, 40, "forward", "bfloat16", 32, True, "nf4"),
    (17, 72, 40, "backward", "bfloat16", 32, True, "nf4"),
]


@pytest.mark.parametrize(
    ("m", "k", "n", "direction", "dtype", "block_size", "double_quant", "codebook"), CASES
)
def test_compiled_kernel(m, k, n, direction, dtype, block_size, double_quant, codebook) -> None:
    random = np.random.default_rng(m * k + n)
    w = random.normal(size=(k, n)).astype(np.float32)
    q = quantize(w, codebook, block_size, double_quant)
    x = jnp.asarray(random.normal(size=(m, k if direction == "forward" else n)), dtype)
    assert_product(emulated(getattr(mosaic, direction), x, q), x, q, direction)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("m", "k", "n", "double_quant"),
    [(3, 256, 256, True), (20, 192, 64, True), (40, 128, 192, False)],
)
def test_compiled_kernel_finds_its_matrix_in_a_stack(m, k, n, double_quant, direction) -> None:
    random = np.random.default_rng(m)
    matrices = [
        quantize(random.normal(size=(k, n)).astype(np.float32), codebook, 32, double_quant)
        for codebook in ("nf4", "fp4_bnb", "int4")
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices)
    x = jnp.asarray(random.normal(size=(m, k if direction == "forward" else n)), jnp.bfloat16)
    y = np.asarray(emulated(getattr(mosaic, direction), x, QLayer(stack, jnp.int32(2))))
    assert_product(y, x, matrices[2], direction)


def assert_product(y: np.ndarray, x: jax.Array, q: QTensor, direction: str) -> None:
    """Asserts that y is the product within float32 accumulation and one rounding."""
    dtype = x.dtype
    weight = rounded_weight(q, dtype)
    weight = weight if direction == "forward" else weight.T
    left = np.asarray(x).astype(np.float64)
    exact, size = left @ weight, np.abs(left) @ np.abs(weight)
    allowed = EPSILON[dtype.name] / 2 * np.abs(exact) + left.shape[1] * 2.0**-24 * size
    assert np.all(np.abs(y.astype(np.float64) - exact) <= allowed * (1 + 1e-6))


@pytest.mark.parametrize("columns", [(64, 64), (128, 64, 192)])
def test_compiled_kernel_of_several_weights(columns) -> None:
    """Two weights in two parts each, and three of different widths, equal each weight alone."""
    k = 4096 if len(columns) == 2 else 512
    random = np.random.default_rng(k)
    qs = [quantize(random.normal(size=(k, n)).astype(np.float32)) for n in columns]
    x = jnp.asarray(random.normal(size=(3, k)), jnp.bfloat16)
    ys = emulated(mosaic.several, x, qs)
    assert [y.shape for y in ys] == [(3, n) for n in columns]
    for y, q in zip(ys, qs):
        assert_product(np.asarray(y), x, q, "forward")
        np.testing.assert_array_equal(y, emulated(mosaic.forward, x, q))


def emulated(product, x: jax.Array, q):
    """Returns the product; the emulator runs the kernel."""
    kernels, left, weights = captured(product, x, q)
    launch = functools.partial(mosaic.launch, kernels)
    (compiled,) = ptx_compile.kernels(launch, left, weights).values()
    shapes = [(kernel.splits, left.shape[0], kernel.outer) for kernel in kernels]
    outs = [
        np.full((s * m, n), np.nan, kernel.out_dtype) for kernel, (s, m, n) in zip(kernels, shapes)
    ]
    compiled.run(*(np.array(a) for a in jax.tree.leaves((left, weights))), *outs)
    parts = [jnp.asarray(out).reshape(shape) for out, shape in zip(outs, shapes)]
    return jax.tree.map(np.asarray, launched(product, x, q, lambda *_: parts))


def captured(product, x: jax.Array, q) -> tuple:
    """Returns the arguments with which the product calls its launch."""
    calls = []

    def called(kernels, left, weights):
        calls.append((kernels, left, weights))
        return [jnp.zeros((k.splits, left.shape[0], k.outer), left.dtype) for k in kernels]

    launched(product, x, q, called)
    (call,) = calls
    return call


def launched(product, x: jax.Array, q, launch):
    """Returns the product as computed for sm_80, with `launch` in place of the real launch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic, "launch", launch)
        patch.setattr(mosaic.utils, "_infer_arch", lambda: (8, 0))
        return product(x, q)


def test_every_codebook_is_among_the_cases() -> None:
    assert {case[-1] for case in CASES} == set(CODEBOOKS)
