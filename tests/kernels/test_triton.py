"""The Triton kernels in interpret mode against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection import mostly_slow

from qlora_jax.kernels import matmul, triton
from qlora_jax.kernels.triton_tiles import TILES, tile_for
from qlora_jax.quant import CODEBOOKS, dequantize, quantize

pytestmark = pytest.mark.quick

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "INTERPRET", True)
        yield


def wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def assert_product(y, x, w, dtype: str) -> None:
    """y is x @ w to float32 accumulation and one rounding to dtype."""
    exact, size = wide(x) @ wide(w), np.abs(wide(x)) @ np.abs(wide(w))
    allowed = EPSILON[dtype] / 2 * np.abs(exact) + x.shape[-1] * 2.0**-24 * size
    assert y.dtype == dtype
    assert np.all(np.abs(wide(y) - exact) <= allowed * (1 + 1e-6))


@jax.jit
def both(x, q, g):
    """The product and the gradient of x for one of the product."""
    y, pull = jax.vjp(lambda x: matmul(x, q, "triton"), x)
    return y, pull(g)[0]


@settings(max_examples=5, deadline=None)
@given(
    m=st.integers(1, 70),
    k=st.integers(1, 200),
    n=st.integers(1, 80),
    block_size=st.sampled_from([32, 64, 128]),
    codebook=st.sampled_from(sorted(CODEBOOKS)),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_directions(m, k, n, block_size, codebook, double_quant, seed) -> None:
    random = np.random.default_rng(seed)
    w = random.normal(size=(k, n)).astype(np.float32)
    q = quantize(w, codebook, block_size, double_quant)
    x = jnp.asarray(random.normal(size=(m, k)), jnp.float32)
    g = jnp.asarray(random.normal(size=(m, n)), jnp.float32)
    y, gx = both(x, q, g)
    weight = np.asarray(jax.jit(dequantize)(q))
    assert_product(y, x, weight, "float32")
    assert_product(gx, g, weight.T, "float32")


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float16"], "bfloat16"))
def test_16_bits(dtype: str) -> None:
    random = np.random.default_rng(0)
    q = quantize(random.normal(size=(192, 80)).astype(np.float32), "nf4", 64, False)
    x = jnp.asarray(random.normal(size=(2, 9, 192)), dtype)
    y, pull = jax.vjp(lambda x: matmul(x, q, "triton"), x)
    assert_product(y, x, dequantize(q, dtype), dtype)
    assert_product(pull(y)[0], y, dequantize(q, dtype).T, dtype)


def test_no_rows() -> None:
    q = quantize(np.ones((64, 8), np.float32))
    assert triton.forward(jnp.zeros((2, 0, 64)), q).shape == (2, 0, 8)


@pytest.mark.parametrize("remat", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_scan_of_checkpointed_layers(remat) -> None:
    random = np.random.default_rng(0)
    stack = quantize(random.normal(size=(3, 64, 64)).astype(np.float32) / 8)
    x = jnp.asarray(random.normal(size=(5, 64)), jnp.float32)

    def loss(x, implementation):
        body = remat(lambda x, q: (jnp.tanh(matmul(x, q, implementation)), None))
        return jax.lax.scan(body, x, stack)[0].sum()

    grads = [jax.jit(jax.grad(loss), static_argnums=1)(x, i) for i in ("triton", "xla")]
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-5)


def kernels(jaxpr) -> list:
    """Grids of the kernels in a jaxpr and all it calls."""
    found = []
    for e in jaxpr.eqns:
        if e.primitive.name == "pallas_call":
            found.append(e.params["grid_mapping"].grid)
            continue
        for value in jax.tree.leaves(list(e.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += kernels(inner)
    return found


def test_a_batch_over_one_weight_is_more_rows_of_one_kernel() -> None:
    random = np.random.default_rng(0)
    q = quantize(random.normal(size=(64, 32)).astype(np.float32))
    xs = jnp.asarray(random.normal(size=(4, 16, 64)), jnp.bfloat16)

    def gradient(x):
        return jax.grad(lambda x: matmul(x, q, "triton").astype(jnp.float32).sum())(x)

    for function in (lambda x: matmul(x, q, "triton"), gradient):
        grids = kernels(jax.make_jaxpr(jax.vmap(function))(xs).jaxpr)
        assert grids
        assert all(grid[0] == 64 // tile_for(64, xs.dtype).m for grid in grids)
        assert all(len(grid) == 2 for grid in grids)
        single = [function(x) for x in xs]
        np.testing.assert_allclose(
            wide(jax.vmap(function)(xs)), wide(jnp.stack(single)), rtol=2e-2, atol=1e-2
        )


def test_a_batch_of_weights() -> None:
    random = np.random.default_rng(0)
    stack = quantize(random.normal(size=(3, 64, 32)).astype(np.float32))
    xs = jnp.asarray(random.normal(size=(3, 5, 64)), jnp.float32)
    y = jax.vmap(lambda x, q: matmul(x, q, "triton"))(xs, stack)
    expected = np.einsum("lmk,lkn->lmn", wide(xs), wide(dequantize(stack)))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("itemsize", TILES)
def test_tiles_grow_with_m(itemsize: int) -> None:
    dtype = {2: "bfloat16", 4: "float32"}[itemsize]
    picked = [tile_for(m, dtype) for m in (1, 16, 17, 64, 5000)]
    assert picked == sorted(picked)
    assert picked[0].m == 16
    assert picked[-1] == TILES[itemsize][-1]
