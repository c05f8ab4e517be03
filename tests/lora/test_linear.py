"""The LoRA linear without a decoder: its product, its gradient and its merged weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.lora import LoraLinear
from qlora_jax.lora.variables import LoraB, LoraParam
from qlora_jax.quant import dequantize, quantize

pytestmark = pytest.mark.quick

K, N, RANK = 64, 24, 4


def base(kind, *stack):
    """Returns W as stored, and its values in float64."""
    w = np.random.default_rng(0).normal(size=(*stack, K, N)).astype(np.float32)
    if kind == "nf4":
        q = quantize(w)
        return q, np.asarray(dequantize(q), np.float64)
    return jnp.asarray(w), w.astype(np.float64)


def make(kind, *stack):
    """Makes a linear with nonzero B; returns it and W + scale * A @ B in float64."""
    weight, exact = base(kind, *stack)
    bias = jnp.ones((*stack, N))
    linear = LoraLinear.from_weight(weight, bias, key=jax.random.key(1), rank=RANK, alpha=8.0)
    b = linear.adapter.b
    b.set_value(jax.random.normal(jax.random.key(2), b.get_value().shape))
    a, b = (np.asarray(v.get_value(), np.float64) for v in (linear.adapter.a, linear.adapter.b))
    return linear, exact + 8.0 / RANK * a @ b


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_one_linear_needs_no_stack(kind):
    linear, exact = make(kind)
    x = np.random.default_rng(3).normal(size=(5, K)).astype(np.float32)
    np.testing.assert_allclose(linear(x), x @ exact + 1, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(linear.merge(), exact, rtol=1e-5, atol=1e-5)
    weights = linear.adapter.weights()
    assert (weights.rank, weights.shape, weights.scale) == (RANK, (K, N), 2.0)


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_a_stack_is_scanned_and_merged_layer_by_layer(kind):
    linear, exact = make(kind, 3)
    x = np.random.default_rng(3).normal(size=(3, 5, K)).astype(np.float32)
    graph, state = nnx.split(linear)
    y = jax.lax.map(lambda xs: nnx.merge(graph, xs[0])(xs[1]), (state, jnp.asarray(x)))
    np.testing.assert_allclose(y, x @ exact + 1, rtol=1e-4, atol=1e-3)
    for i in range(3):
        np.testing.assert_allclose(linear.merge(i), exact[i], rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    np.testing.assert_allclose(mapped, x @ exact + 1, rtol=1e-4, atol=1e-3)


def test_a_fresh_adapter_changes_nothing():
    weight, _ = base("nf4")
    x = jax.random.normal(jax.random.key(0), (5, K))
    fresh = LoraLinear.from_weight(weight, key=jax.random.key(1))
    np.testing.assert_array_equal(fresh(x), LoraLinear(weight)(x))


def test_flaxs_own_filter_finds_a_and_b():
    linear, _ = make("nf4")
    _, trained, _ = nnx.split(linear, nnx.LoRAParam, ...)
    found = jax.tree.leaves(trained, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert [type(variable) for variable in found] == [LoraParam, LoraB]


def test_only_a_and_b_are_differentiated():
    linear, _ = make("nf4")
    graph, trained, frozen = nnx.split(linear, LoraParam, ...)
    x = jax.random.normal(jax.random.key(0), (5, K))
    target = jax.random.normal(jax.random.key(4), (5, N))

    def loss(trained):
        return jnp.sum((nnx.merge(graph, trained, frozen)(x) - target) ** 2) / 2

    slopes = jax.grad(loss)(trained)
    a, b = (np.asarray(v.get_value(), np.float64) for v in (linear.adapter.a, linear.adapter.b))
    rest = np.asarray(linear(x) - target, np.float64)
    np.testing.assert_allclose(slopes["adapter"]["b"].get_value(), 2 * (x @ a).T @ rest, rtol=1e-3)
    np.testing.assert_allclose(
        slopes["adapter"]["a"].get_value(), 2 * np.asarray(x).T @ rest @ b.T, rtol=1e-3, atol=1e-2
    )
