"""matmul against numpy in float64, under every transformation the models use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels import matmul
from qlora_jax.quant import dequantize, nbytes, quantize
from qlora_jax.runtime.errors import UserError

EPSILON = {
    jnp.dtype(jnp.float32): 2.0**-23,
    jnp.dtype(jnp.bfloat16): 2.0**-7,
    jnp.dtype(jnp.float16): 2.0**-10,
}
SHAPES = [(128, 48, 64), (200, 40, 128), (33, 8, 32)]


def make(k, n, block_size, dtype=jnp.float32, seed=0, lead=()):
    random = np.random.default_rng(seed)
    w = random.normal(size=(*lead, k, n)).astype(np.float32) / np.sqrt(k)
    x = jnp.asarray(random.normal(size=(2, 3, k)), dtype)
    return x, quantize(w, "nf4", block_size)


def wide(array):
    return np.asarray(array).astype(np.float64)


def assert_product(y, x, w, dtype):
    """y is x @ w to float32 accumulation and one rounding to dtype."""
    exact = wide(x) @ wide(w)
    size = np.abs(wide(x)) @ np.abs(wide(w))
    allowed = EPSILON[jnp.dtype(dtype)] / 2 * np.abs(exact) + x.shape[-1] * 2.0**-24 * size
    assert y.dtype == dtype
    assert np.all(np.abs(wide(y) - exact) <= allowed * (1 + 1e-6))


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize(("k", "n", "block_size"), SHAPES)
@pytest.mark.quick
def test_product_and_gradient(dtype, k, n, block_size):
    x, q = make(k, n, block_size, dtype)
    w = dequantize(q, dtype)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, n)), dtype)

    @jax.jit
    def both(x, q, g):
        y, pull = jax.vjp(lambda x: matmul(x, q), x)
        return y, pull(g)[0]

    y, gx = both(x, q, g)
    assert_product(y, x, w, dtype)
    assert_product(gx, g, w.T, dtype)


@pytest.mark.parametrize(
    ("dtype", "k", "n", "block_size", "double_quant"),
    [
        (dtype, *shape, bool((i + j) % 2))  # every shape and every dtype with either
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
        return np.sin(x @ wide(dequantize(q))).sum()

    slope = exact_loss(wide(x) + step * direction) - exact_loss(wide(x) - step * direction)
    ours = np.sum(wide(jax.jit(jax.grad(loss))(x)) * direction)
    assert ours == pytest.approx(slope / (2 * step), rel=1e-3)


def chain(x, stack, wrap):
    """x through tanh(x @ W_i) for every layer of a stack, summed."""

    def body(x, q):
        return jnp.tanh(matmul(x, q)), None

    return jax.lax.scan(wrap(body), x, stack)[0].sum()


def exact_chain(x, layers):
    """The same and its gradient, in float64."""
    inputs = [x]
    for w in layers:
        inputs.append(np.tanh(inputs[-1] @ w))
    g = np.ones_like(inputs[-1])
    for w, y in zip(layers[::-1], inputs[:0:-1]):
        g = (g * (1 - y**2)) @ w.T
    return inputs[-1].sum(), g


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.quick
def test_scan_over_a_stack(wrap):
    x, stack = make(96, 96, 64, lead=(4,))
    value, grad = jax.jit(jax.value_and_grad(functools.partial(chain, wrap=wrap)))(x, stack)
    expected, expected_grad = exact_chain(wide(x), list(wide(dequantize(stack))))
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_vmap_over_x_and_over_a_stack():
    x, stack = make(96, 96, 64, lead=(4,))
    xs = jnp.stack([x, 2 * x, -x, x + 1])
    one = jax.tree.map(lambda leaf: leaf[1], stack)
    mapped = jax.jit(jax.vmap(jax.grad(lambda x: (matmul(x, one) ** 2).sum())))(xs)
    w = wide(dequantize(one))
    np.testing.assert_allclose(mapped, 2 * wide(xs) @ w @ w.T, rtol=1e-4, atol=1e-4)
    each = jax.jit(jax.vmap(matmul))(xs, stack)
    expected = np.einsum("lbtk,lkn->lbtn", wide(xs), wide(dequantize(stack)))
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-5)


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
    """The forward scan puts out neither floats of a weight's shape nor copies of the codes."""
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


@pytest.mark.parametrize(
    ("x", "implementation", "message"),
    [
        ((2, 64), "cuda", "implementation 'cuda' is not known; known: xla, triton"),
        ((2, 65), None, r"x \(2, 65\) does not match one matrix, q \(64, 8\)"),
    ],
)
def test_errors(x, implementation, message):
    q = quantize(np.ones((64, 8), np.float32))
    with pytest.raises(UserError, match=message):
        matmul(jnp.ones(x), q, implementation)


def test_a_stack_is_no_matrix():
    q = quantize(np.ones((3, 64, 8), np.float32))
    with pytest.raises(UserError, match="does not match one matrix"):
        matmul(jnp.ones((3, 64)), q)
