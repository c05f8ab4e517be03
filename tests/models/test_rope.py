import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.config import Rope
from qlora_jax.models.rope import frequencies, rotate, rotation

LLAMA3 = [
    1, 0.44036663, 0.19392276, 0.085397102, 0.037606031, 0.016560441, 0.0072926651, 0.0032114461,
    0.00042955671, 1.9461639e-05, 8.5702559e-06, 3.7740544e-06, 1.6619674e-06, 7.3187493e-07,
    3.2229329e-07, 1.419272e-07,
]  # fmt: skip
"""inv_freq of transformers 5.23.0 for theta 500000, head_dim 32 and Llama 3.2's scaling."""


def test_llama3_frequencies_are_transformers():
    rope = Rope(
        theta=500000.0,
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_positions=8192,
    )
    np.testing.assert_allclose(frequencies(rope, 32), LLAMA3, rtol=1e-6)


def test_default_and_linear_frequencies():
    expected = [10000.0 ** (-i / 4) for i in range(4)]
    np.testing.assert_allclose(frequencies(Rope(), 8), expected, rtol=1e-6)
    linear = frequencies(Rope(kind="linear", factor=4.0), 8)
    np.testing.assert_allclose(linear, np.array(expected) / 4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_turns_channel_pairs_as_complex_numbers(dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 5, 3, 16)), dtype)
    positions = random.integers(0, 400, size=(2, 5))
    turned = rotate(x, *rotation(jnp.asarray(positions), Rope(), 16))
    assert turned.dtype == dtype
    wide = np.asarray(x).astype(np.float64)
    angles = positions[..., None, None] * 10000.0 ** (-np.arange(8) / 8)
    expected = (wide[..., :8] + 1j * wide[..., 8:]) * np.exp(1j * angles)
    expected = np.concatenate([expected.real, expected.imag], axis=-1)
    tolerance = 1e-4 if dtype == jnp.float32 else 2.0**-8 * 4
    np.testing.assert_allclose(np.asarray(turned, np.float64), expected, rtol=0, atol=tolerance)
