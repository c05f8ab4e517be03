import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.formats.config_json import SCALINGS
from qlora_jax.models.config import Rope
from qlora_jax.models.families import ROPES
from qlora_jax.models.generate import generate
from qlora_jax.models.rope import KINDS, frequencies, rotate, rotation, segment_lengths
from qlora_jax.models.rope_config import READERS
from qlora_jax.runtime.errors import UserError

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


YARN = Rope(kind="yarn", factor=4.0, original_positions=64, attention_factor=1.138629436111989)
DYNAMIC = Rope(kind="dynamic", factor=4.0, original_positions=256)
LONGROPE = Rope(
    kind="longrope",
    original_positions=64,
    short=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7),
    long=(2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
    attention_factor=1.1547005383792517,
)


@pytest.mark.parametrize(
    ("rope", "length", "expected"),
    [
        (
            YARN,
            None,
            [1, 0.23717082, 0.05, 0.0079056947, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05],
        ),
        (
            dataclasses.replace(YARN, truncate=False, beta_fast=8.0, beta_slow=2.5),
            None,
            [1, 0.13073078, 0.025, 0.0079056947, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05],
        ),
        (
            DYNAMIC,
            256,
            [1, 0.31622776, 0.1, 0.031622779, 0.01, 0.0031622779, 0.001, 0.00031622779],
        ),
        (
            DYNAMIC,
            300,
            [1, 0.29345167, 0.086113885, 0.025270268, 0.007415602, 0.0021761211, 0.00063858635,
             0.00018739424],
        ),
        (
            DYNAMIC,
            1000,
            [1, 0.22013101, 0.04845766, 0.010667033, 0.002348145, 0.00051689951, 0.00011378562,
             2.5047742e-05],
        ),
        (
            LONGROPE,
            64,
            [1, 0.28747976, 0.083333336, 0.024325214, 0.0071428572, 0.0021081853, 0.000625,
             0.00018601633],
        ),
        (
            LONGROPE,
            65,
            [0.5, 0.10540925, 0.025, 0.0063245557, 0.0016666667, 0.00045175396, 0.000125,
             3.5136418e-05],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_scaled_frequencies_are_transformers(rope, length, expected):
    """Expects inv_freq of transformers 5.24.0: theta 10000, head_dim 16, sequences of `length`."""
    lengths = None if length is None else jnp.full((1, 3), length)
    found = np.broadcast_to(frequencies(rope, 16, lengths), (1, 3, 1, 8))
    np.testing.assert_allclose(found[0, 1, 0], expected, rtol=2e-6)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=str)
def test_without_lengths_a_sequence_is_short(rope):
    short = frequencies(rope, 16, jnp.full((1, 1), rope.original_positions))
    np.testing.assert_allclose(frequencies(rope, 16), short[0, 0, 0], rtol=1e-7)


def test_the_attention_factor_multiplies_cosine_and_sine():
    positions = jnp.arange(40)[None]
    scaled = np.array(rotation(positions, YARN, 16))
    plain = np.array(rotation(positions, dataclasses.replace(YARN, attention_factor=1.0), 16))
    np.testing.assert_allclose(scaled, 1.138629436111989 * plain, rtol=1e-6)


def test_every_kind_is_in_every_table():
    assert set(KINDS) == set(READERS) == set(SCALINGS) == set(ROPES)


def test_lengths_of_segments():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 900, 900, 0, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 0, 1]])
    expected = [[3, 3, 3, 2, 2, 1, 1], [7] * 7, [1, 1, 1, 2, 2, 2, 2]]
    np.testing.assert_array_equal(segment_lengths(segments, positions), expected)


def scaled_model(open_model, name, rope):
    model = open_model(name)
    pairs = model.config.head_dim // 2
    if rope.kind == "longrope":
        rope = dataclasses.replace(rope, short=rope.short[:pairs], long=rope.long[:pairs])
    model.config = dataclasses.replace(model.config, rope=rope)
    return model


@functools.partial(jax.jit, static_argnums=0)
def compute(structure, weights, tokens, segments, positions):
    model = nnx.merge(structure, weights)
    return model.logits(model.hidden(tokens, segments, positions, dtype=jnp.float32))


def logits(model, tokens, segments, positions):
    return np.asarray(compute(*nnx.split(model), tokens, segments, positions))


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("gemma3", LONGROPE),
        ("smollm3", dataclasses.replace(DYNAMIC, original_positions=64)),
    ],
)
@pytest.mark.quick
def test_packing_changes_no_logits(open_model, name, rope):
    """In one row, a long and a short segment are each rotated as if alone."""
    model = scaled_model(open_model, name, rope)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (1, 120)), jnp.int32)
    segments = jnp.array([[1] * 90 + [2] * 30])
    positions = jnp.array([[*range(90), *range(30)]])
    packed = logits(model, tokens, segments, positions)
    for part, number in ((slice(0, 90), 1), (slice(90, 120), 2)):
        # the other segment is padding, all at position 0
        here = segments == number
        alone = logits(model, tokens, jnp.where(here, 1, 0), jnp.where(here, positions, 0))
        np.testing.assert_allclose(packed[:, part], alone[:, part], atol=2e-5)
    short = dataclasses.replace(model.config.rope, original_positions=120)
    model.config = dataclasses.replace(model.config, rope=short)
    other = logits(model, tokens, segments, positions)
    np.testing.assert_allclose(packed[:, 90:], other[:, 90:], atol=2e-5)
    assert np.abs(packed - other).max() > 1e-3


@pytest.mark.quick
def test_generation_stays_where_the_frequencies_are_one_set(open_model):
    model = scaled_model(open_model, "llama", LONGROPE)
    assert (model.config.longest, model.config.longest_cached) == (512, 64)
    settings = {"stop_ids": (), "pad_id": 0, "dtype": jnp.float32}
    prompt = list(range(1, 50))
    (drawn,) = generate(model, [prompt], max_new_tokens=15, **settings)
    whole = jnp.array([prompt + drawn], jnp.int32)
    again = logits(model, whole, jnp.ones_like(whole), jnp.arange(64)[None])
    assert np.argmax(again[0, 48:63], axis=-1).tolist() == drawn
    with pytest.raises(UserError, match="64 positions, beyond which its rope scaling changes; sho"):
        generate(model, [prompt], max_new_tokens=16, **settings)


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
