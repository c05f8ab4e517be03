"""8-bit values: bitsandbytes' tables and codes; each code is the nearest value of the map."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.quant import nbytes
from qlora_jax.quant.dynamic8 import BLOCK, decode8, dynamic_map, encode8, nearest

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dynamic8.npz")
kinds = pytest.mark.parametrize("kind", ["signed", "unsigned"])
encoded = jax.jit(encode8, static_argnums=1)
decoded = jax.jit(decode8)


def golden(kind: str, key: str) -> np.ndarray:
    return GOLDEN[f"{kind}/{key}"]


@kinds
def test_the_map_is_bitsandbytes_bit_for_bit(kind: str) -> None:
    ours = dynamic_map(kind == "signed")
    np.testing.assert_array_equal(ours.view(np.int32), golden(kind, "map").view(np.int32))


@kinds
def test_codes_absmax_and_values_are_bitsandbytes(kind: str) -> None:
    """The inputs include all midpoints between two values of the map: ties take the lower."""
    q = encoded(jnp.asarray(golden(kind, "input")), kind == "signed")
    np.testing.assert_array_equal(q.codes, golden(kind, "codes"))
    np.testing.assert_array_equal(q.absmax, golden(kind, "absmax"))
    np.testing.assert_array_equal(decoded(q), golden(kind, "decoded"))


@kinds
def test_bitsandbytes_table_for_cpus_differs_only_within_a_step_of_a_middle(kind: str) -> None:
    """The CPU kernel first rounds x / absmax to steps of 2/65535: an error of up to 1/65535."""
    x, values = golden(kind, "input").astype(np.float64), golden(kind, "map").astype(np.float64)
    scale = np.repeat(golden(kind, "absmax"), BLOCK)[: x.size]
    scaled = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    to_a_middle = np.abs(scaled[:, None] - (values[1:] + values[:-1]) / 2).min(axis=1)
    q = encoded(jnp.asarray(golden(kind, "input")), kind == "signed")
    differ = (np.asarray(q.codes) != golden(kind, "tabulated")) & (scale > 0)
    assert differ.any()
    assert to_a_middle[differ].max() < 1.01 / 65535


@kinds
def test_the_look_up_is_a_binary_search(kind: str) -> None:
    """Tests both ends of each interval of floats with equal upper 16 bits, and all ties."""
    values = dynamic_map(kind == "signed")
    middle = (values[1:] + values[:-1]) / 2
    upper = np.arange(2**16, dtype=np.uint32) << 16
    edges = np.concatenate([upper, upper | 1, upper | 0xFFFF]).view(np.float32)
    above, below = np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2))
    x = np.concatenate([edges[np.isfinite(edges)], middle, above, below])
    found = jax.jit(nearest, static_argnums=1)(x, kind == "signed")
    np.testing.assert_array_equal(found, np.searchsorted(middle, x))


@kinds
@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(1,), (255,), (256,), (3, 171), (2, 4, 64), (0,)]),
    spread=st.floats(0, 4),
    size=st.floats(-30, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_value_of_the_map_is_nearer(
    kind: str, shape: tuple[int, ...], spread: float, size: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=shape) * 10 ** (random.normal(size=shape) * spread + size)
    x = np.clip(x, -1e36, 1e36).astype(np.float32)
    x = np.where(np.abs(x) < 1e-36, 0, x) if kind == "signed" else np.abs(x)
    q = encoded(jnp.asarray(x), kind == "signed")
    assert q.codes.shape == shape
    error = np.abs(np.asarray(decoded(q), np.float64) - x).reshape(-1)
    for i, absmax in enumerate(np.asarray(q.absmax)):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        block = x.reshape(-1)[part].astype(np.float64)
        assert absmax == np.abs(block).max()
        steps = dynamic_map(kind == "signed").astype(np.float64) * absmax
        least = np.abs(block[:, None] - steps).min(axis=1)
        assert (error[part] <= least + 1e-6 * np.abs(block) + 1e-37).all()


@kinds
def test_what_is_largest_is_kept_exactly(kind: str) -> None:
    x = np.linspace(0.2, 0.9, 3 * BLOCK, dtype=np.float32)
    last = np.asarray(decoded(encoded(jnp.asarray(x), kind == "signed")))[BLOCK - 1 :: BLOCK]
    np.testing.assert_array_equal(last, x[BLOCK - 1 :: BLOCK])


def test_zeros_stay_zero_whatever_is_beside_them() -> None:
    x = jnp.zeros((4, 200)).at[3, 7].set(2.5)
    for signed in (True, False):
        np.testing.assert_array_equal(decoded(encoded(x, signed)), x)


@pytest.mark.parametrize(("shape", "scales"), [((64, 64), 16), ((3, 100), 2), ((0,), 0)])
def test_bytes(shape: tuple[int, ...], scales: int) -> None:
    q = jax.eval_shape(encode8, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert nbytes(q) == np.prod(shape) + 4 * scales
