"""NNX models of every kind, 4-bit and with adapters, against plain models of equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import CASES, Busy, Experts, Looped, Structured, X
from selection import mostly_slow

import qlora_jax as qj
from qlora_jax.modules.axes import to_matrices
from qlora_jax.modules.candidates import candidates
from qlora_jax.modules.nnx_model import all_adapters

pytestmark = pytest.mark.quick
SCALE = 2.0
"""alpha / rank."""
OFTEN = ("bfloat16", "Tied", "scan", "experts")


@pytest.fixture(scope="module", autouse=True)
def _axes():
    qj.register_kernel(Looped, "w", "...k,kn->...n")
    qj.register_kernel(Structured, "w", "...k,kn->...n")
    qj.register_kernel(Busy, "w", "...k,kn->...n")


def made(case):
    model = case.make(nnx.Rngs(0))
    if isinstance(model, Experts):
        qj.discover(model, X)
    return model


def adapted(case, quantized, **settings):
    model = made(case)
    if quantized:
        qj.quantize_model(model, case.where, block_size=32, embeddings=case.embeddings)
    settings = {"rank": 2, "alpha": 2 * SCALE, "rngs": nnx.Rngs(1), **settings}
    return qj.add_lora(model, case.where, **settings)


def trained(model, seed=3):
    """Gives B random values, as after some training, in place, and returns the model."""
    random = np.random.default_rng(seed)
    for _, _, adapter in all_adapters(model):
        b = adapter.b.get_value()
        adapter.b.set_value(jnp.asarray(0.1 * random.normal(size=b.shape), b.dtype))
    return model


def floats(out):
    return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]


def near(x, y, tolerance):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, float(np.abs(y).max())))


@pytest.mark.parametrize("name", mostly_slow(CASES, *OFTEN))
def test_step_0_is_the_base_to_the_bit(name):
    case = CASES[name]
    run = nnx.jit(lambda model: floats(case.call(model)))
    for x, y in zip(run(made(case)), run(adapted(case, quantized=False)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", mostly_slow(CASES, *OFTEN))
def test_values_and_gradients_are_those_of_plain_weights(name):
    """Compares values and gradients with a plain model that holds the merged weights W + s·A·B.

    With G the gradient of the merged weight, the chain rule gives the expected gradients:
    d/dA = s·G·Bᵀ and d/dB = s·Aᵀ·G.
    """
    case = CASES[name]
    model = trained(adapted(case, quantized=True))
    plain = qj.merge(model)
    assert not list(all_adapters(plain))

    def loss(trained, frozen, graph):
        out = floats(case.call(qj.join(graph, trained, frozen)))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in out), out

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    graph, lora, frozen = qj.split(model)
    grads, out = step(lora, frozen, graph)
    plain_graph, params, rest = nnx.split(plain, nnx.Param, ...)
    exact, expected = step(params, rest, plain_graph)
    coarse = name == "bfloat16"
    for x, y in zip(out, expected, strict=True):
        near(x, y, 2e-2 if coarse else 2e-5)

    nnx.update(model, jax.tree.map(lambda x: x, lora))
    values = {p: a for p, _, a in all_adapters(model)}
    values = {p: (a.a.get_value(), a.b.get_value()) for p, a in values.items()}
    nnx.update(model, grads)
    nnx.update(plain, exact)
    weights = {c.path: c for c in candidates(plain, case.where)}
    assert values.keys() == weights.keys()
    for path, _, adapter in all_adapters(model):
        a, b = values[path]
        g = to_matrices(weights[path].variable.get_value(), weights[path].axes)
        g = g.astype(jnp.float32)
        tolerance = 3e-2 if coarse else 1e-4
        near(adapter.a.get_value(), SCALE * g @ b.swapaxes(-1, -2), tolerance)
        near(adapter.b.get_value(), SCALE * a.swapaxes(-1, -2) @ g, tolerance)
        assert np.abs(adapter.b.get_value()).max() > 1e-4
