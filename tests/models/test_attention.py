import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models import attention
from qlora_jax.models.attention import attend, visible


@pytest.fixture(autouse=True, params=[256, 2], ids="{} rows".format)
def rows(request, monkeypatch):
    """Every test with all queries at a time and with two."""
    monkeypatch.setattr(attention, "ROWS", request.param)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_query_sees_its_own_segment_up_to_itself_and_within_the_window(window):
    segments = np.array([[1, 1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2]])
    positions = np.array([[0, 1, 2, 3, 0, 1, 0], [0, 0, 1, 2, 3, 4, 5]])
    mask = visible(
        segments, segments, positions, positions, None if window is None else jnp.int32(window)
    )
    assert mask.shape == (2, 1, 7, 7)
    for row in range(2):
        for q in range(7):
            start = next(i for i in range(7) if segments[row, i] == segments[row, q])
            first = start if window is None else max(start, q - window + 1)
            assert np.flatnonzero(mask[row, 0, q]).tolist() == list(range(first, q + 1))


def make(seed: int = 0) -> list[np.ndarray]:
    """q [2, 3, 4, 8], k and v [2, 5, 2, 8], a mask, and a cotangent of q's shape."""
    random = np.random.default_rng(seed)
    q, g = random.normal(size=(2, 2, 3, 4, 8)).astype(np.float32)
    k, v = random.normal(size=(2, 2, 5, 2, 8)).astype(np.float32)
    mask = random.random((2, 1, 3, 5)) < 0.6
    mask[..., 0] = True
    return [q, k, v, mask, g]


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Attention head by head, float64."""
    out = np.zeros(q.shape)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[b, :, h].astype(np.float64) @ k[b, :, h // 2].T
        scores *= scale or q.shape[-1] ** -0.5
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        p = np.where(mask[b, 0], np.exp(scores), 0)
        out[b, :, h] = p / p.sum(axis=-1, keepdims=True) @ v[b, :, h // 2]
    return out


OPTIONS = [{}, {"scale": 0.7, "softcap": 1.5}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])


@each_option
def test_attention_is_softmax_of_scaled_products_of_grouped_heads(options):
    *inputs, _ = make()
    expected = reference(*inputs, **options)
    np.testing.assert_allclose(attend(*inputs, **options), expected, rtol=1e-4, atol=1e-5)


@each_option
@pytest.mark.parametrize("argument", range(3), ids="qkv")
@pytest.mark.quick
def test_gradient_is_the_finite_difference(argument, options):
    *inputs, g = make()
    pull = jax.vjp(functools.partial(attend, **options), *inputs)[1]
    ours, step = np.asarray(pull(jnp.asarray(g))[argument]), 1e-5
    expected = np.zeros(ours.shape)
    for place in np.ndindex(ours.shape):
        ends = []
        for sign in (1, -1):
            moved = [x.astype(np.float64) if i < 3 else x for i, x in enumerate(inputs)]
            moved[argument][place] += sign * step
            ends.append(np.sum(g * reference(*moved, **options)))
        expected[place] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_a_16_bit_gradient_is_rounded_not_wrong():
    *inputs, mask, g = make()
    exact = jax.vjp(attend, *inputs, mask)[1](jnp.asarray(g))[:3]
    short = [jnp.asarray(x, jnp.bfloat16) for x in (*inputs, g)]
    found = jax.vjp(attend, *short[:3], mask)[1](short[3])[:3]
    for ours, expected in zip(found, exact):
        assert ours.dtype == jnp.bfloat16
        error = np.abs(np.asarray(ours, np.float32) - expected).max()
        assert error < 4 * 2.0**-8 * np.abs(expected).max()


def test_scores_are_not_residuals():
    q, k, v, mask, _ = make()
    saved = jax.eval_shape(
        lambda q, k, v: jax.vjp(lambda *x: attend(*x, mask), q, k, v)[1], q, k, v
    )
    largest = max(leaf.size for leaf in jax.tree.leaves(saved))
    assert largest <= q.size


def test_no_scores_of_all_queries_exist(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 64)
    heads, length = 4, 1024
    q = jnp.zeros((1, length, heads, 8))
    mask = jnp.ones((1, 1, length, length), bool)

    def loss(q, k, v):
        return attend(q, k, v, mask).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
    scores = heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


def test_a_query_that_sees_nothing_gets_a_finite_average():
    v = jnp.arange(6.0).reshape(1, 3, 1, 2)
    out = attend(jnp.ones((1, 1, 1, 2)), v, v, jnp.zeros((1, 1, 1, 3), bool))
    np.testing.assert_allclose(out[0, 0, 0], [2.0, 3.0], rtol=1e-6)
