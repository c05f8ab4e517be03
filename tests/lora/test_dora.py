"""DoRA against its definition, computed in float64, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.lora import AdapterSpec, LoraLinear, LoraParam, LoraWeights, init_adapter
from qlora_jax.lora.variants import VARIANTS
from qlora_jax.lora.variants.dora import merged_weight
from qlora_jax.quant import dequantize, quantize

pytestmark = pytest.mark.quick

SPECS = [AdapterSpec(4, 8, 2.0), None, AdapterSpec(2, 8, 4.0)]
K, N = 64, 24


def values(seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return [
        s and LoraWeights(0.3 * draw(K, s.rank), 0.3 * draw(s.rank, N), s.alpha, s.scale)
        for s in SPECS
    ]


def weights(kind):
    w = np.random.default_rng(5).normal(size=(3, K, N)).astype(np.float32)
    if kind == "nf4":
        q = quantize(w, block_size=32)
        return q, np.asarray(jax.jit(dequantize)(q), np.float64)
    return jnp.asarray(w), w.astype(np.float64)


def make(kind, dropout=0.0, freeze_a=False, start=None):
    """Makes a stack of DoRA linears, magnitudes unlike the norms; returns it and W in float64."""
    weight, exact = weights(kind)
    linear = LoraLinear(weight)
    key = jax.random.key(0)
    adapter = init_adapter(key, SPECS, K, N, "gaussian", dropout, jnp.float32, freeze_a)
    adapter.fill(values() if start is None else start)
    adapter = VARIANTS["dora"](adapter, weight)
    linear.adapter = nnx.data(adapter)
    return linear, exact


def apply(linear, x, key=None):
    """Applies all layers in one scan, as the decoder does: [L, rows, K] to [L, rows, N]."""
    graph, state = nnx.split(linear)

    def body(_, xs):
        state, x = xs
        return None, nnx.merge(graph, state)(x, key)

    return jax.jit(lambda state, x: jax.lax.scan(body, None, (state, x))[1])(state, x)


def exact_product(w, linear, x):
    out = []
    for i, (spec, value) in enumerate(zip(SPECS, values())):
        adapted = w[i]
        if spec is not None:
            adapted = adapted + spec.scale * value.a.astype(np.float64) @ value.b
            m = np.asarray(linear.adapter.magnitude.get_value()[i], np.float64)
            adapted = adapted * m / np.linalg.norm(adapted, axis=0)
        out.append(x[i] @ adapted)
    return np.stack(out)


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_the_product_is_the_definitions(kind):
    linear, w = make(kind)
    random = np.random.default_rng(1)
    x = random.normal(size=(3, 5, K)).astype(np.float32)
    start = exact_product(w, linear, x)
    plain = np.stack(
        [
            x[i] @ (w[i] + (s.scale * v.a.astype(np.float64) @ v.b if s else 0))
            for i, (s, v) in enumerate(zip(SPECS, values()))
        ]
    )
    np.testing.assert_allclose(start, plain, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(apply(linear, x), plain, rtol=1e-5, atol=1e-4)
    m = linear.adapter.magnitude
    m.set_value(m.get_value() * jnp.asarray(random.uniform(0.5, 2, m.get_value().shape), "float32"))
    moved = exact_product(w, linear, x)
    np.testing.assert_allclose(apply(linear, x), moved, rtol=1e-5, atol=1e-4)
    assert np.abs(moved - plain).max() > 1
    for i in (0, 2):
        v = linear.adapter.weights(i)
        merged = merged_weight(jnp.asarray(w[i], "float32"), v.a, v.b, SPECS[i].scale, v.magnitude)
        np.testing.assert_allclose(x[i] @ np.asarray(merged), moved[i], rtol=1e-4, atol=1e-4)


def test_a_column_of_zeros_stays_zero():
    weight = jnp.asarray(weights("float32")[0]).at[:, :, 3].set(0)
    linear = LoraLinear(weight)
    fresh = init_adapter(jax.random.key(0), SPECS, K, N, "gaussian", 0.0, jnp.float32)
    linear.adapter = nnx.data(VARIANTS["dora"](fresh, weight))
    y = np.asarray(apply(linear, jnp.ones((3, 2, K))))
    assert np.isfinite(y).all()
    assert not y[:, :, 3].any()


def gradients(linear, x, target):
    graph, trained, rest = nnx.split(linear, LoraParam, ...)

    def loss(trained):
        y = apply(nnx.merge(graph, trained, rest), x)
        return jnp.sum((y - target) ** 2) / 2

    return jax.grad(loss)(trained)


def test_gradients_take_the_norms_as_constants():
    linear, w = make("float32")
    random = np.random.default_rng(2)
    x, target = (random.normal(size=(3, 5, n)).astype(np.float32) for n in (K, N))
    found = gradients(linear, x, target)
    norms = [
        np.linalg.norm(w[i] + s.scale * v.a.astype(np.float64) @ v.b, axis=0) if s else None
        for i, (s, v) in enumerate(zip(SPECS, values()))
    ]

    def loss(i, a, b, m):
        y = x[i] @ (w[i] + SPECS[i].scale * a @ b) * m / norms[i]
        return np.sum((y - target[i]) ** 2) / 2

    for i in (0, 2):
        v = linear.adapter.weights(i)
        point = [np.asarray(p, np.float64) for p in (v.a, v.b, v.magnitude)]
        for name, place in (("a", 0), ("b", 1), ("magnitude", 2)):
            slope = np.asarray(found["adapter"][name].get_value()[i])
            for index in [(0, 0), (1, 1), (3, 1)] if place < 2 else [(0,), (7,)]:
                index = tuple(min(j, n - 1) for j, n in zip(index, point[place].shape))
                ends = []
                for step in (1e-4, -1e-4):
                    shifted = [p.copy() for p in point]
                    shifted[place][index] += step
                    ends.append(loss(i, *shifted))
                expected = (ends[0] - ends[1]) / 2e-4
                assert slope[index] == pytest.approx(expected, rel=2e-3, abs=1e-2)


def test_padding_and_a_layer_without_an_adapter_have_no_gradient():
    linear, _ = make("nf4")
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 5, K)), jnp.float32)
    found = {k: np.asarray(v.get_value()) for k, v in gradients(linear, x, 1.0)["adapter"].items()}
    assert found["a"][0].all()
    assert found["magnitude"][0].all()
    assert not found["a"][2, :, 2:].any()
    assert not found["b"][2, 2:].any()
    for name in ("a", "b", "magnitude"):
        assert not found[name][1].any()


def test_dropout_is_on_the_input_of_a_alone():
    linear, w = make("float32", dropout=0.5, start=[None] * 3)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5, K)), jnp.float32)
    with_dropout = apply(linear, x, jax.random.key(1))
    np.testing.assert_allclose(with_dropout, np.asarray(x) @ w, rtol=1e-5, atol=1e-4)


def test_sizes_count_a_magnitude_for_each_adapter():
    linear, _ = make("float32")
    assert linear.adapter.sizes() == (6 * (K + N) + 2 * N,) * 2
    linear, _ = make("float32", freeze_a=True)
    assert linear.adapter.sizes() == (6 * N + 2 * N, 6 * (K + N) + 2 * N)
