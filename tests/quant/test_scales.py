"""The table of scale formats: one entry is enough to add a format."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.formats.bitsandbytes import StoredLayout, encode
from qlora_jax.kernels import matmul, triton
from qlora_jax.quant import dequantize, nbytes, quantize
from qlora_jax.quant import qtensor as qtensors
from qlora_jax.quant.qtensor import block_scales
from qlora_jax.quant.scales import DOUBLE, PLAIN, SCALES, ScaleFormat, StoredScales

pytestmark = pytest.mark.quick


def power_of_two(absmax: jax.Array, nested_block: int) -> StoredScales:
    """Stores the exponent of the next power of two in 8 bits, so that absmax <= scale."""
    exponent = jnp.ceil(jnp.log2(jnp.maximum(absmax, 2.0**-126)))
    return StoredScales(exponent.astype(jnp.int8))


def from_power(stored: StoredScales, nested_block: int) -> jax.Array:
    return jnp.exp2(stored.scales.astype(jnp.float32))


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Adds a format to the table and uses it in place of double quantization."""
    monkeypatch.setitem(SCALES, "int8", ScaleFormat(power_of_two, from_power))
    monkeypatch.setattr(qtensors, "DOUBLE", "int8")
    qtensors._quantize.clear_cache()
    yield "int8"
    qtensors._quantize.clear_cache()


@pytest.mark.parametrize("name", [PLAIN, DOUBLE])
def test_the_dtype_of_the_scales_names_the_format(name: str) -> None:
    w = np.random.default_rng(0).normal(size=(128, 32)).astype(np.float32)
    q = quantize(w, double_quant=name == DOUBLE)
    assert q.scales.dtype.name == name
    absmax = np.abs(w.reshape(2, 64, 32)).max(1)
    decoded = SCALES[name].decode(StoredScales(q.scales, q.nested, q.offset), q.nested_block)
    np.testing.assert_allclose(decoded, absmax, rtol=0.05)


def test_a_new_format_is_one_entry(one_more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "INTERPRET", True)
    w = np.random.default_rng(0).normal(size=(128, 48)).astype(np.float32)
    q = quantize(w)
    assert q.scales.dtype.name == one_more
    assert nbytes(q) == 128 * 48 // 2 + 2 * 48 + 4 * 16
    powers = np.exp2(np.ceil(np.log2(np.abs(w.reshape(2, 64, 48)).max(1))))
    np.testing.assert_array_equal(block_scales(q), powers)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 128)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    for implementation in ("xla", "triton"):
        y, pull = jax.vjp(lambda x, name=implementation: matmul(x, q, name), x)
        np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)
        assert pull(jnp.ones_like(y))[0].shape == x.shape


def test_bitsandbytes_gets_a_format_that_it_knows(one_more: str) -> None:
    q = quantize(np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32))
    layout = StoredLayout("nf4", 64, "float32", (64, 128), None)
    stored = encode(q, layout)
    assert stored[".absmax"].dtype == np.float32
    np.testing.assert_array_equal(stored[".absmax"], np.asarray(block_scales(q)).T.reshape(-1))
