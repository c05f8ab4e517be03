"""LoRA and 4-bit leaves on plain trees, against W + scale * A @ B in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax import UserError
from qlora_jax.lora.trees import apply, init, quantize_tree


@pytest.fixture
def params():
    key = jax.random.key(0)
    return {
        "layers": [
            {"query": {"kernel": jax.random.normal(key, (64, 32)), "bias": jnp.ones(32)}},
            {"up": jax.random.normal(key, (3, 64, 128)).astype(jnp.bfloat16)},
        ],
        "norm": jnp.ones(64),
    }


def test_fresh_adapters_change_nothing(params):
    adapters = init(jax.random.key(1), params, ["query", "up"], rank=4)
    assert adapters.keys() == {"layers.0.query.kernel", "layers.1.up"}
    assert adapters["layers.1.up"].a.shape == (3, 64, 4)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(apply(params, adapters))):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("scaling", "scale"), [("alpha/r", 4.0), ("alpha/sqrt(r)", 8.0)])
def test_apply_adds_scaled_product(params, scaling, scale):
    adapters = init(jax.random.key(1), params, ".*kernel", rank=4, alpha=16, scaling=scaling)
    adapters = jax.tree.map(lambda x: x + 0.5, adapters)
    found = apply(params, adapters)["layers"][0]["query"]["kernel"]
    a, b = (np.asarray(adapters["layers.0.query.kernel"].__dict__[n], np.float64) for n in "ab")
    expected = np.asarray(params["layers"][0]["query"]["kernel"], np.float64) + scale * a @ b
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_gradient_is_of_a_and_b_alone(params):
    adapters = init(jax.random.key(1), params, ".*kernel", rank=4)
    x = jax.random.normal(jax.random.key(2), (5, 64))

    def loss(adapters):
        return jnp.sum(jnp.sin(x @ qj.lora.apply(params, adapters)["layers"][0]["query"]["kernel"]))

    gradient = jax.grad(loss)(adapters)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, adapters)
    w, own = params["layers"][0]["query"]["kernel"], adapters["layers.0.query.kernel"]
    expected = own.scale * (x @ own.a).T @ jnp.cos(x @ w)
    np.testing.assert_allclose(gradient["layers.0.query.kernel"].b, expected, rtol=1e-4, atol=1e-4)


def test_quantized_leaves_decode_and_multiply(params):
    q = quantize_tree(params, ".*(kernel|up)", codebook="nf4")
    kernel = params["layers"][0]["query"]["kernel"]
    np.testing.assert_array_equal(
        qj.dequantize(q["layers"][0]["query"]["kernel"]), qj.dequantize(qj.quantize(kernel))
    )
    assert q["layers"][1]["up"].shape == (3, 64, 128)
    assert q["norm"] is params["norm"]


def test_refused(params):
    q = quantize_tree(params, ".*kernel")
    adapters = init(jax.random.key(1), q, ".*kernel", rank=4)
    with pytest.raises(UserError, match=r"layers.0.query.kernel: is in 4 bits.*qlora_jax.matmul"):
        apply(q, adapters)
    with pytest.raises(UserError, match=r"layers.0.query.kernel: is in 4 bits already"):
        quantize_tree(q, ".*kernel")
    with pytest.raises(UserError, match="matches none of the leaves"):
        quantize_tree(params, "kernel")
    with pytest.raises(UserError, match="tree has no such leaf"):
        apply({"other": jnp.ones((64, 32))}, adapters)
    with pytest.raises(UserError, match=r"shape \(3, 3\), but its adapter is for \(64, 32\)"):
        apply({"layers": [{"query": {"kernel": jnp.ones((3, 3))}}]}, adapters)
    with pytest.raises(UserError, match="rank must be 1 or more"):
        init(jax.random.key(1), params, ".*kernel", rank=0)
    bad = {"kernel": jnp.full((64, 32), jnp.nan)}
    with pytest.raises(UserError, match="kernel: holds NaN"):
        quantize_tree(bad, "kernel")
