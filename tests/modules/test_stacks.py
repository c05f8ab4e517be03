"""Layers that a method takes by index from a stacked weight, against plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_models import trained
from selection import mostly_slow

import qlora_jax as qj

pytestmark = pytest.mark.quick

EXPERTS = 3


class Experts(nnx.Module):
    """Experts in one variable, in the style of tunix: taken in a Python loop, or by index."""

    def __init__(self, rngs: nnx.Rngs, how: str):
        self.w = nnx.Param(0.1 * jax.random.normal(rngs.params(), (EXPERTS, 64, 32)))
        self.how = how

    def __call__(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        if self.how == "loop":
            all = jnp.stack([x @ self.w[...][i] for i in range(EXPERTS)])
            return jnp.einsum("etn,te->tn", all, jax.nn.one_hot(chosen, EXPERTS))
        if self.how == "number":
            return x @ self.w[...][chosen[0]]
        if self.how == "last":
            return x @ self.w[...][-1]
        return jnp.einsum("etk,ekn->etn", jnp.stack([x] * EXPERTS), self.w[...]).sum(0)


X, CHOSEN = jax.random.normal(jax.random.key(5), (4, 64)), jnp.array([2, 0, 1, 2])


@pytest.mark.parametrize("how", mostly_slow(["loop", "number", "last", "batch"], "number"))
def test_experts(how):
    model = Experts(nnx.Rngs(0), how)
    before = jax.jit(model)(X, CHOSEN)
    qj.discover(model, X, CHOSEN)
    qj.add_lora(model, "w", rank=4, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(jax.jit(model)(X, CHOSEN), before)
    qj.quantize_model(trained(model), "w")
    assert qj.summary(model, X, CHOSEN).decoded == {}
    assert model.w.get_raw_value().shape == (EXPERTS, 64, 32)
    plain = qj.merge(model)
    np.testing.assert_allclose(model(X, CHOSEN), plain(X, CHOSEN), atol=2e-6)

    graph, parts, frozen = qj.split(model)

    def loss(parts):
        return jnp.sum(jnp.sin(qj.join(graph, parts, frozen)(X, CHOSEN)))

    a, b = (jax.grad(loss)(parts).w_adapters.default[n].get_value() for n in "ab")
    adapter = model.w_adapters["default"]

    def dense_loss(a, b):
        dense = qj.merge(model)
        w = (
            qj.dequantize(model.w.get_raw_value())
            + adapter.scale.get_value()[:, None, None] * a @ b
        )
        dense.w.set_value(w)
        return jnp.sum(jnp.sin(dense(X, CHOSEN)))

    expected = jax.grad(dense_loss, (0, 1))(adapter.a.get_value(), adapter.b.get_value())
    for found, right in zip((a, b), expected):
        np.testing.assert_allclose(found, right, atol=1e-4)


def test_a_part_of_a_matrix_is_no_layer():
    class Part(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (64, 32)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x[:, 0] * (self.w[...][0] @ jnp.ones(32)) + (x @ self.w[...]).sum(-1)

    model = Part(nnx.Rngs(0))
    before = model(X)
    qj.discover(model, X)
    qj.quantize_model(model, "w")
    assert model.w.get_raw_value().shape == (64, 32)
    assert qj.summary(model, X).decoded == {"w": ("slice",)}
    np.testing.assert_allclose(model(X), qj.merge(model)(X), rtol=1e-5)
    assert jnp.abs(model(X) - before).max() > 0
