"""A matrix named by its index in a stack: same product and gradient as the matrix alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels import matmul
from qlora_jax.quant import QLayer, QTensor, dequantize, quantize
from qlora_jax.quant.stack import apart, as_qtensor, joined

LAYERS, K, N = 4, 96, 40


@pytest.fixture(scope="module")
def stack() -> QTensor:
    w = np.random.default_rng(0).normal(size=(LAYERS, K, N)).astype(np.float32)
    return quantize(w / np.sqrt(K))


def test_it_is_the_matrix_in_its_place(stack: QTensor) -> None:
    for i in range(LAYERS):
        layer = QLayer(stack, jnp.int32(i))
        assert (layer.shape, layer.ndim) == ((K, N), 2)
        jax.tree.map(np.testing.assert_array_equal, as_qtensor(layer), stack[i])
    assert as_qtensor(stack) is stack


def test_a_tree_is_taken_apart_and_joined_for_each_layer(stack: QTensor) -> None:
    bias = jnp.arange(LAYERS * N, dtype=jnp.float32).reshape(LAYERS, N)
    tree = {"q": {"weight": stack, "bias": bias}, "none": None, "norm": bias + 1}
    rest, stacks = apart(tree)
    assert jax.tree.leaves(rest)[0].shape == bias.shape
    assert not any(isinstance(x, QTensor) for x in jax.tree.leaves(rest, is_leaf=_is_q))
    assert jax.tree.structure(stacks["q"]["weight"]) == jax.tree.structure(stack)
    one = joined(jax.tree.map(lambda x: x[2], rest), stacks, jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, as_qtensor(one["q"]["weight"]), stack[2])
    np.testing.assert_array_equal(one["q"]["bias"], bias[2])
    np.testing.assert_array_equal(one["norm"], bias[2] + 1)
    assert one["none"] is None


def _is_q(x: object) -> bool:
    return isinstance(x, QTensor)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_a_scan_over_places_is_a_scan_over_matrices(wrap) -> None:
    """The gradients are bit-identical, and no scan stores codes for the backward pass."""
    w = np.random.default_rng(1).normal(size=(LAYERS, N, N)).astype(np.float32)
    stack = quantize(w / np.sqrt(N), block_size=32)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, N)), jnp.bfloat16)

    def gradient(scanned, weight):
        def body(x, one):
            return jnp.tanh(matmul(x, weight(one))), None

        return jax.grad(lambda x: jax.lax.scan(wrap(body), x, scanned)[0].astype(float).sum())

    by_matrix = gradient(stack, lambda q: q)
    by_place = gradient(jnp.arange(LAYERS), lambda i: QLayer(stack, i))
    ours, theirs = (np.asarray(jax.jit(f)(x), np.float32) for f in (by_place, by_matrix))
    np.testing.assert_array_equal(ours, theirs)
    equations = jax.make_jaxpr(by_place)(x).jaxpr.eqns
    stored = [v.aval for e in equations if e.primitive.name == "scan" for v in e.outvars]
    assert max(a.size for a in stored) == LAYERS * x.size


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_rows_over_places_and_over_both(stack: QTensor, axes) -> None:
    xs = np.random.default_rng(3).normal(size=(LAYERS, 2, K)).astype(np.float32)
    x, i = xs if axes[0] == 0 else xs[0], jnp.arange(LAYERS) if axes[1] == 0 else jnp.int32(1)
    mapped = jax.jit(jax.vmap(lambda x, i: matmul(x, QLayer(stack, i)), in_axes=axes))(x, i)
    expected = x.astype(np.float64) @ np.asarray(dequantize(stack), np.float64)[np.asarray(i)]
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)
