"""Properties of `matmul` beyond the contract of test_conformance.py: memory, one row, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import EPSILON, assert_product, to_float64

from qlora_jax.kernels import matmul
from qlora_jax.quant import dequantize, nbytes, quantize
from qlora_jax.runtime.errors import UserError

SHAPES = [(128, 48, 64), (200, 40, 128), (33, 8, 32)]


def make(k, n, block_size, dtype=jnp.float32, seed=0, lead=()):
    random = np.random.default_rng(seed)
    w = random.normal(size=(*lead, k, n)).astype(np.float32) / np.sqrt(k)
    x = jnp.asarray(random.normal(size=(2, 3, k)), dtype)
    return x, quantize(w, "nf4", block_size)


@pytest.mark.parametrize(
    ("dtype", "k", "n", "block_size", "double_quant"),
    [
        (dtype, *shape, bool((i + j) % 2))  # every shape and every dtype, both with and without
        for i, dtype in enumerate(EPSILON)
        for j, shape in enumerate([*SHAPES, (64, 1, 64), (576, 192, 4096)])
    ],
)
@pytest.mark.quick
def test_one_row_is_the_product_with_the_unrounded_weight(dtype, k, n, block_size, double_quant):
    x, _ = make(k, n, block_size, dtype)
    w = np.random.default_rng(2).normal(size=(k, n)).astype(np.float32)
    q = quantize(w, "lloyd", block_size, double_quant)
    y = jax.jit(matmul)(x[:1, :1], q)
    assert y.shape == (1, 1, n)
    assert_product(y, x[:1, :1], dequantize(q), dtype)


@pytest.mark.quick
def test_gradient_is_the_finite_difference():
    x, q = make(200, 40, 128)
    direction = np.random.default_rng(2).normal(size=x.shape)
    step = 2.0**-7

    def loss(x):
        return jnp.sum(jnp.sin(matmul(x, q)))

    def exact_loss(x):
        return np.sin(x @ to_float64(dequantize(q))).sum()

    slope = exact_loss(to_float64(x) + step * direction) - exact_loss(
        to_float64(x) - step * direction
    )
    ours = np.sum(to_float64(jax.jit(jax.grad(loss))(x)) * direction)
    assert ours == pytest.approx(slope / (2 * step), rel=1e-3)


def chain(x, stack, wrap):
    """Applies tanh(x @ W_i) for every layer of a stack; returns the sum of the result."""

    def body(x, q):
        return jnp.tanh(matmul(x, q)), None

    return jax.lax.scan(wrap(body), x, stack)[0].sum()


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_backward_pass_keeps_the_codes_and_never_the_weight(double_quant):
    k, n = 256, 192
    x = jnp.ones((1, k))
    q = quantize(np.random.default_rng(0).normal(size=(k, n)), double_quant=double_quant)
    _, pull = jax.vjp(lambda x: matmul(x, q), x)
    assert nbytes(pull) <= nbytes(q) + nbytes(x)
    assert nbytes(q) < k * n


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_a_scanned_backward_pass_stores_activations_alone(wrap):
    """The forward scan stores neither floats of a weight's shape nor copies of the codes."""
    layers, k = 8, 256
    x, stack = make(k, k, 64, lead=(layers,))
    gradient = jax.grad(functools.partial(chain, wrap=wrap))
    equations = jax.make_jaxpr(gradient)(x, stack).jaxpr.eqns
    scans = [e for e in equations if e.primitive.name == "scan"]
    assert len(scans) == 2
    stored = [v.aval for e in scans for v in e.outvars]
    assert max(a.size for a in stored) == layers * x.size
    assert not any(jnp.issubdtype(a.dtype, jnp.integer) and a.ndim > 1 for a in stored)

    temp = jax.jit(gradient).lower(x, stack).compile().memory_analysis().temp_size_in_bytes
    assert temp < layers * k * k * 4 / 2


def test_an_unknown_implementation_is_refused():
    q = quantize(np.ones((64, 8), np.float32))
    with pytest.raises(UserError, match="implementation 'cuda' is not known; known: xla, triton"):
        matmul(jnp.ones((2, 64)), q, "cuda")
