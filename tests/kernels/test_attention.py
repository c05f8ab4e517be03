import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.attention import attend, reference


@pytest.fixture(autouse=True, params=[(256, 1024), (2, 4), (2, 2)], ids=str)
def blocks(request, monkeypatch):
    """Runs every test with one block of all queries and keys, and with small (also ragged) ones."""
    monkeypatch.setattr(reference, "QUERIES", request.param[0])
    monkeypatch.setattr(reference, "KEYS", request.param[1])


def make(seed: int = 0) -> list[np.ndarray]:
    """Makes q [2, 3, 4, 8], k and v [2, 5, 2, 8], first and last keys, cotangent [2, 3, 32]."""
    random = np.random.default_rng(seed)
    q, g = random.normal(size=(2, 2, 3, 4, 8)).astype(np.float32)
    k, v = random.normal(size=(2, 2, 5, 2, 8)).astype(np.float32)
    first = np.array([[0, 1, 3], [2, 2, 0]], np.int32)
    last = np.array([[0, 4, 3], [2, 3, 4]], np.int32)
    return [q, k, v, first, last, g.reshape(2, 3, 32)]


def dense(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Computes attention head by head in float64; concatenates the heads."""
    out = np.zeros(q.shape)
    places = np.arange(k.shape[1])
    seen = (places >= first[..., None]) & (places <= last[..., None])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[b, :, h].astype(np.float64) @ k[b, :, h // 2].T
        scores *= scale or q.shape[-1] ** -0.5
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        p = np.where(seen[b], np.exp(scores), 0)
        out[b, :, h] = p / p.sum(axis=-1, keepdims=True) @ v[b, :, h // 2]
    return out.reshape(*out.shape[:2], -1)


OPTIONS = [{}, {"scale": 0.7, "softcap": 1.5}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])


@each_option
def test_attention_is_softmax_of_scaled_products_of_grouped_heads(options):
    *inputs, _ = make()
    expected = dense(*inputs, **options)
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
            ends.append(np.sum(g * dense(*moved, **options)))
        expected[place] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_a_16_bit_gradient_is_rounded_not_wrong():
    *inputs, first, last, g = make()
    exact = jax.vjp(attend, *inputs, first, last)[1](jnp.asarray(g))[:3]
    short = [jnp.asarray(x, jnp.bfloat16) for x in (*inputs, g)]
    found = jax.vjp(attend, *short[:3], first, last)[1](short[3])[:3]
    for ours, expected in zip(found, exact):
        assert ours.dtype == jnp.bfloat16
        error = np.abs(np.asarray(ours, np.float32) - expected).max()
        assert error < 4 * 2.0**-8 * np.abs(expected).max()


def test_scores_are_not_residuals():
    q, k, v, first, last, _ = make()
    saved = jax.eval_shape(
        lambda q, k, v: jax.vjp(lambda *x: attend(*x, first, last), q, k, v)[1], q, k, v
    )
    largest = max(leaf.size for leaf in jax.tree.leaves(saved))
    assert largest <= q.size


def test_no_scores_of_all_queries_exist(monkeypatch):
    monkeypatch.setattr(reference, "QUERIES", 64)
    monkeypatch.setattr(reference, "KEYS", 128)
    heads, length = 4, 1024
    q = jnp.zeros((1, length, heads, 8))
    last = jnp.arange(length)[None]

    def loss(q, k, v):
        return attend(q, k, v, jnp.zeros_like(last), last).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
    scores = heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 8


@pytest.mark.quick
def test_keys_that_no_query_of_a_block_sees_are_not_read(monkeypatch):
    monkeypatch.setattr(reference, "QUERIES", 2)
    monkeypatch.setattr(reference, "KEYS", 2)
    q, k, v, first, last, g = make()
    first, last = np.full_like(first, 2), np.full_like(last, 3)
    for x in (k, v):
        x[:, :2] = x[:, 4:] = np.nan
    out, pull = jax.vjp(lambda *x: attend(*x, first, last), q, k, v)
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in pull(jnp.asarray(g)))
