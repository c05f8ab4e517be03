"""The contract of `matmul`, which every implementation must keep.

To run all of these tests on a new implementation, add it to `IMPLEMENTATIONS`. Properties of a
single implementation (tiles, layouts, memory) are tested in a separate file.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import assert_product, to_float64
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qlora_jax import kernels
from qlora_jax.kernels import matmul, matmul_many, triton
from qlora_jax.quant import CODEBOOKS, QLayer, QTensor, dequantize, quantize
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick


class Implementation(NamedTuple):
    """One implementation under test.

    Attributes:
      name: name in `kernels.IMPLEMENTATIONS`.
      dtypes: supported dtypes of x.
      runs: context manager in which the implementation runs on the CPU.
      weight: function (q, dtype) -> weight [K, N] with the roundings of the implementation.
    """

    name: str
    dtypes: tuple[str, ...]
    runs: Callable[[], contextlib.AbstractContextManager[None]]
    weight: Callable[[QTensor, str], np.ndarray]


def decoded(q: QTensor, dtype: str) -> np.ndarray:
    """Returns the weight decoded in float32 and rounded once to dtype."""
    return to_float64(jax.jit(dequantize, static_argnums=1)(q, dtype))


def rounded(q: QTensor, dtype: str) -> np.ndarray:
    """Returns codebook times scale; both are rounded to dtype, and so is their product."""
    from plain_mosaic import rounded_weight

    return rounded_weight(q, jnp.dtype(dtype))


@contextlib.contextmanager
def interpreted_triton() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "INTERPRET", True)
        yield


@contextlib.contextmanager
def interpreted_mosaic() -> Iterator[None]:
    """Runs Pallas' interpreter, which also looks for races, with device code in plain JAX."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from plain_mosaic import device_code

    from qlora_jax.kernels.mosaic import kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "device_code", device_code)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield


ALL = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = [
    Implementation("xla", ALL, contextlib.nullcontext, decoded),
    Implementation("triton", ALL, interpreted_triton, decoded),
    Implementation("mosaic", ("bfloat16", "float16"), interpreted_mosaic, rounded),
]
needs_jax_011 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11 (Python 3.12)"
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, id=each.name, marks=needs_jax_011 if each.name == "mosaic" else ())
        for each in IMPLEMENTATIONS
    ],
)
def under_test(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    with request.param.runs():
        yield request.param


def test_every_implementation_is_tested() -> None:
    assert {each.name for each in IMPLEMENTATIONS} == set(kernels.IMPLEMENTATIONS)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def both(name: str, x: jax.Array, q: QTensor | QLayer, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the product x @ W, and the gradient of x for the gradient g of the product."""
    y, pull = jax.vjp(lambda x: matmul(x, q, name), x)
    return y, pull(g)[0]


# No shrinking phase, because each example of new shapes compiles for a second or more.
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    m=st.integers(2, 70),
    k=st.integers(1, 200),
    n=st.integers(1, 130),
    block_size=st.sampled_from([32, 64, 128]),
    codebook=st.sampled_from(sorted(CODEBOOKS)),
    double_quant=st.booleans(),
    dtype=st.sampled_from(ALL),
    seed=st.integers(0, 2**32 - 1),
)
def test_product_and_gradient(
    under_test: Implementation,
    m: int,
    k: int,
    n: int,
    block_size: int,
    codebook: str,
    double_quant: bool,
    dtype: str,
    seed: int,
) -> None:
    if dtype not in under_test.dtypes:
        dtype = under_test.dtypes[0]
    q = quantize(normal(seed, k, n), codebook, block_size, double_quant)
    x, g = (jnp.asarray(normal(seed + i, m, size), dtype) for i, size in ((1, k), (2, n)))
    y, gx = both(under_test.name, x, q, g)
    w = under_test.weight(q, dtype)
    assert_product(y, x, w, dtype)
    assert_product(gx, g, w.T, dtype)


@pytest.mark.parametrize("dtype", ALL)
def test_every_dtype_and_leading_axes(under_test: Implementation, dtype: str) -> None:
    if dtype not in under_test.dtypes:
        pytest.skip(f"{under_test.name} does not take {dtype}")
    q = quantize(normal(0, 192, 80), "nf4", 64, False)
    x, g = (jnp.asarray(normal(i, 2, 9, size), dtype) for i, size in ((1, 192), (2, 80)))
    y, gx = both(under_test.name, x, q, g)
    assert y.shape == g.shape
    assert gx.shape == x.shape
    w = under_test.weight(q, dtype)
    assert_product(y, x, w, dtype)
    assert_product(gx, g, w.T, dtype)


def test_no_rows(under_test: Implementation) -> None:
    q = quantize(np.ones((64, 8), np.float32))
    dtype = under_test.dtypes[-1]
    y, gx = both(under_test.name, jnp.zeros((2, 0, 64), dtype), q, jnp.zeros((2, 0, 8), dtype))
    assert (y.shape, gx.shape) == ((2, 0, 8), (2, 0, 64))


@pytest.mark.parametrize("remat", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_gradient_of_a_scan_over_layers(under_test: Implementation, remat: Callable) -> None:
    if (under_test.name, remat) == ("mosaic", jax.checkpoint):
        pytest.skip("Pallas' interpreter has ordered effects, which jax.checkpoint does not take")
    dtype = under_test.dtypes[0]
    stack = quantize(normal(0, 3, 64, 64) / 8)
    x = jnp.asarray(normal(1, 5, 64), dtype)

    @jax.jit
    def gradient(x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, q: QTensor) -> tuple[jax.Array, None]:
            return jnp.tanh(matmul(x, q, under_test.name)), None

        def loss(x: jax.Array) -> jax.Array:
            return jax.lax.scan(remat(layer), x, stack)[0].astype(jnp.float32).sum()

        return jax.grad(loss)(x)

    inputs = [to_float64(x)]
    layers = [under_test.weight(stack[i], dtype) for i in range(3)]
    for w in layers:
        inputs.append(np.tanh(inputs[-1] @ w))
    expected = np.ones_like(inputs[-1])
    for w, y in zip(layers[::-1], inputs[:0:-1]):
        expected = (expected * (1 - y**2)) @ w.T
    # each of 3 layers rounds about 4 values in each direction
    atol = 24 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(to_float64(gradient(x)), expected, rtol=0, atol=atol)


def test_vmap_over_rows(under_test: Implementation) -> None:
    dtype = under_test.dtypes[0]
    q = quantize(normal(0, 64, 32))
    xs, gs = (jnp.asarray(normal(i, 4, 16, size), dtype) for i, size in ((1, 64), (2, 32)))
    y, gx = jax.vmap(lambda x, g: both(under_test.name, x, q, g))(xs, gs)
    w = under_test.weight(q, dtype)
    assert_product(y, xs, w, dtype)
    assert_product(gx, gs, w.T, dtype)


def test_vmap_over_weights(under_test: Implementation) -> None:
    dtype = under_test.dtypes[0]
    stack = quantize(normal(0, 3, 64, 32))
    xs, gs = (jnp.asarray(normal(i, 3, 5, size), dtype) for i, size in ((1, 64), (2, 32)))
    y, gx = jax.vmap(functools.partial(both, under_test.name))(xs, stack, gs)
    for i in range(3):
        w = under_test.weight(stack[i], dtype)
        assert_product(y[i], xs[i], w, dtype)
        assert_product(gx[i], gs[i], w.T, dtype)


@pytest.mark.parametrize("n", [64, 72], ids=["whole tiles", "padded"])
def test_a_layer_of_a_stack_is_that_weight_alone(under_test: Implementation, n: int) -> None:
    stack = quantize(normal(0, 3, 128, n), block_size=32)
    x, g = (jnp.asarray(normal(i, 5, size), "bfloat16") for i, size in ((1, 128), (2, n)))
    for i in (0, 2):
        ours = both(under_test.name, x, QLayer(stack, jnp.int32(i)), g)
        for a, b in zip(ours, both(under_test.name, x, stack[i], g)):
            np.testing.assert_array_equal(to_float64(a), to_float64(b))


@pytest.mark.parametrize("columns", [(64, 64), (128, 72, 64)])
def test_several_weights_at_once_are_those_alone(
    under_test: Implementation, columns: tuple[int, ...]
) -> None:
    k = 4096 if len(columns) == 2 else 256
    qs = [QLayer(quantize(normal(i, 2, k, n)), jnp.int32(1)) for i, n in enumerate(columns)]
    x = jnp.asarray(normal(9, 3, k), "bfloat16")

    @functools.partial(jax.jit, static_argnums=0)
    def products_and_gradient(products: Callable, x: jax.Array) -> tuple:
        ys, pull = jax.vjp(lambda x: products(x, qs, under_test.name), x)
        return *ys, pull(ys)[0]

    def one_by_one(x: jax.Array, qs: list[QLayer], name: str) -> list[jax.Array]:
        return [matmul(x, q, name) for q in qs]

    results = [products_and_gradient(f, x) for f in (matmul_many, one_by_one)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(to_float64(a), to_float64(b))


def test_several_weights_at_once_under_vmap(under_test: Implementation) -> None:
    qs = [quantize(normal(n, 64, n)) for n in (64, 128)]
    xs = jnp.asarray(normal(1, 2, 3, 64), "bfloat16")
    mapped = jax.vmap(lambda x: matmul_many(x, qs, under_test.name))(xs)
    for y, q in zip(mapped, qs, strict=True):
        assert_product(y, xs, under_test.weight(q, "bfloat16"), "bfloat16")


def test_shapes_that_do_not_match_are_refused(under_test: Implementation) -> None:
    q = quantize(np.ones((64, 8), np.float32))
    with pytest.raises(UserError, match=r"x \(2, 65\).*\(64, 8\)"):
        matmul(jnp.ones((2, 65), "bfloat16"), q, under_test.name)
    stack = quantize(np.ones((3, 64, 8), np.float32))
    with pytest.raises(UserError, match=r"x \(3, 64\).*\(3, 64, 8\)"):
        matmul(jnp.ones((3, 64), "bfloat16"), stack, under_test.name)
