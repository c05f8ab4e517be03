"""dense against numpy in float64: values and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import EPSILON, assert_product, to_float64

from qlora_jax.kernels.dense import dense, product


def make(compute: str, storage: str, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes x [2, 5, 48], w [48, 24] and a cotangent [2, 5, 24]."""
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(2, 5, 48)), compute)
    w = jnp.asarray(random.normal(size=(48, 24)) / 7, storage)
    return x, w, jnp.asarray(random.normal(size=(2, 5, 24)), compute)


@pytest.mark.parametrize("storage", sorted(EPSILON))
@pytest.mark.parametrize("compute", sorted(EPSILON))
def test_value_and_gradients(compute: str, storage: str) -> None:
    x, w, g = make(compute, storage)
    y, pull = jax.vjp(dense, x, w)
    cast = to_float64(w.astype(compute))
    assert_product(y, to_float64(x), cast, compute)
    dx, dw = pull(g)
    assert_product(dx, to_float64(g), cast.T, compute)
    assert dw.shape == w.shape
    assert_product(dw, to_float64(x).reshape(10, 48).T, to_float64(g).reshape(10, 24), storage)


def test_a_float32_weight_gets_a_float32_gradient_in_bfloat16_compute() -> None:
    x, w, g = make("bfloat16", "float32")
    dw = jax.vjp(dense, x, w)[1](g)[1]
    assert np.mean(np.asarray(dw) != np.asarray(dw.astype(jnp.bfloat16))) > 0.9


def test_many_rows_do_not_lose_small_terms() -> None:
    # 4096 terms of 1: a sum kept in bfloat16 would stop at 256.
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.bfloat16)
    y, pull = jax.vjp(dense, x, w)
    assert float(y[0, 0]) == 4096
    rows = jnp.ones((4096, 2), jnp.bfloat16)
    y, pull = jax.vjp(dense, rows, jnp.ones((2, 1), jnp.bfloat16))
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[1], 4096)


@pytest.mark.parametrize("contracted", [0, 1])
def test_product_contracts_either_axis(contracted: int) -> None:
    x, w, _ = make("bfloat16", "bfloat16")
    y = product(x, w if contracted == 0 else w.T, contracted)
    assert_product(y, to_float64(x), to_float64(w), "float32")


def test_no_rows() -> None:
    w = jnp.ones((48, 24))
    y, pull = jax.vjp(dense, jnp.zeros((0, 48)), w)
    assert y.shape == (0, 24)
    np.testing.assert_array_equal(pull(y)[1], np.zeros((48, 24)))


@pytest.mark.parametrize("shape", [(48, 24), (576, 40), (7, 5), (1, 3)])
@pytest.mark.parametrize("contracted", [0, 1])
def test_one_row(shape: tuple[int, int], contracted: int) -> None:
    random = np.random.default_rng(3)
    w = jnp.asarray(random.normal(size=shape[::-1] if contracted else shape), jnp.bfloat16)
    x = jnp.asarray(random.normal(size=(1, 1, shape[0])), jnp.bfloat16)
    y = jax.jit(product, static_argnums=2)(x, w, contracted)
    assert y.shape == (1, 1, shape[1])
    assert_product(y, to_float64(x), to_float64(w).T if contracted else to_float64(w), "float32")


def test_one_row_in_a_loop_keeps_no_copy_of_the_weight() -> None:
    x, w = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((4096, 256), jnp.bfloat16)

    def run(x, w):
        def step(_, x):
            return product(x, w, 1)[:, :256].astype(x.dtype)

        return jax.lax.fori_loop(0, 3, step, x)

    memory = jax.jit(run).lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < w.nbytes
