import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.attention import attend, visible


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


def test_attention_is_softmax_of_scaled_products_of_grouped_heads():
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 3, 4, 8)).astype(np.float32)
    k, v = random.normal(size=(2, 2, 5, 2, 8)).astype(np.float32)
    mask = random.random((2, 1, 3, 5)) < 0.6
    mask[..., 0] = True
    out = np.asarray(attend(q, k, v, mask))
    for b in range(2):
        for h in range(4):
            scores = q[b, :, h].astype(np.float64) @ k[b, :, h // 2].T / np.sqrt(8)
            p = np.where(mask[b, 0], np.exp(scores), 0)
            expected = p / p.sum(axis=-1, keepdims=True) @ v[b, :, h // 2]
            np.testing.assert_allclose(out[b, :, h], expected, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gets_a_finite_average():
    v = jnp.arange(6.0).reshape(1, 3, 1, 2)
    out = attend(jnp.ones((1, 1, 1, 2)), v, v, jnp.zeros((1, 1, 1, 3), bool))
    np.testing.assert_allclose(out[0, 0, 0], [2.0, 3.0], rtol=1e-6)
