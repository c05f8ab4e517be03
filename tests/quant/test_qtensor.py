import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.quant import CODEBOOKS, bits_per_parameter, codebook, dequantize, nbytes, quantize
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import BLOCK_SIZES, _looked_up, block_scales, look_up_codes, selected
from qlora_jax.runtime.errors import UserError

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def nearest(w: np.ndarray, name: str, block_size: int) -> np.ndarray:
    """Returns the nearest decoded value of each element by brute force in float64, [K, N]."""
    values = codebook(name, block_size).astype(np.float64)
    out = np.empty(w.shape)
    for start in range(0, w.shape[0], block_size):
        block = w[start : start + block_size].astype(np.float64)
        absmax = np.abs(block).max(axis=0)
        t = block / np.where(absmax > 0, absmax, 1)
        out[start : start + block_size] = (
            values[np.abs(t[..., None] - values).argmin(axis=-1)] * absmax
        )
    return out


@settings(max_examples=6, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    k=st.integers(1, 300),
    n=st.integers(1, 9),
    block_size=st.sampled_from(BLOCK_SIZES),
    name=st.sampled_from(sorted(CODEBOOKS)),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.quick
def test_values_are_the_nearest_of_their_block(lead, k, n, block_size, name, dtype, seed):
    w = np.random.default_rng(seed).normal(size=(*lead, k, n)).astype(DTYPES[dtype])
    q = quantize(w, name, block_size, double_quant=False)
    assert q.shape == w.shape
    values = np.asarray(dequantize(q)).reshape(-1, k, n)
    for ours, original in zip(values, w.reshape(-1, k, n)):
        original = original.astype(np.float64)
        expected = nearest(original, name, block_size)
        # a tie may take either value, so distances are compared instead of values
        np.testing.assert_allclose(
            np.abs(ours - original),
            np.abs(expected - original),
            rtol=0,
            atol=2e-6 * np.abs(w).max().astype(float),
        )


@settings(max_examples=5, deadline=None)
@given(k=st.integers(1, 400), n=st.integers(1, 40), block_size=st.sampled_from([32, 64, 256]))
@pytest.mark.quick
def test_double_quantization_moves_scales_by_at_most_half_a_step(k, n, block_size):
    w = np.random.default_rng(k * n).normal(size=(k, n)).astype(np.float32)
    single = np.asarray(quantize(w, "nf4", block_size, double_quant=False).scales)
    q = quantize(w, "nf4", block_size)
    widest_step = np.diff(dynamic_map()).max() / 2
    assert (
        np.abs(np.asarray(block_scales(q)) - single).max()
        <= widest_step * np.asarray(q.nested).max() + 1e-6
    )


def test_stack_equals_its_layers():
    w = np.random.default_rng(0).normal(size=(3, 96, 40)).astype(np.float32)
    stack = quantize(w)
    for i in range(3):
        layer = quantize(w[i])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], stack), layer)
    np.testing.assert_array_equal(dequantize(stack)[1], dequantize(quantize(w[1])))


@pytest.mark.quick
def test_zero_blocks_stay_zero():
    w = np.zeros((128, 4), np.float32)
    w[:64, 0] = np.linspace(-1, 1, 64)
    for double_quant in (False, True):
        values = np.asarray(dequantize(quantize(w, double_quant=double_quant)))
        assert np.isfinite(values).all()
    assert np.all(np.asarray(dequantize(quantize(w, double_quant=False)))[64:] == 0)
    assert np.all(np.asarray(dequantize(quantize(np.zeros((64, 8), np.float32)))) == 0)


@pytest.mark.parametrize(
    ("double_quant", "block_size", "bits"),
    [
        (True, 64, 4 + 8 / 64 + 32 / (64 * 256)),
        (False, 64, 4.5),
        (False, 32, 5.0),
        (True, 4096, 4.002),
    ],
)
def test_bits_per_parameter(double_quant, block_size, bits):
    q = jax.eval_shape(
        lambda w: quantize(w, "nf4", block_size, double_quant),
        jax.ShapeDtypeStruct((8, 4096, 4096), jnp.bfloat16),
    )
    assert bits_per_parameter(q) == pytest.approx(bits, abs=1e-4)


def test_codes_take_half_a_byte():
    q = quantize(np.ones((640, 30), np.float32))
    assert nbytes(q.codes) == 640 * 30 // 2


def test_quantizing_twice_changes_nothing():
    w = np.random.default_rng(1).normal(size=(256, 16)).astype(np.float32)
    once = dequantize(quantize(w, double_quant=False))
    np.testing.assert_allclose(dequantize(quantize(once, double_quant=False)), once, rtol=2e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    w = np.random.default_rng(0).normal(size=(256, 96)).astype(np.float32)
    w[137, 61] = bad
    with pytest.raises(UserError, match=r"layers.7.q_proj: holds NaN or Inf"):
        quantize(w, name="layers.7.q_proj")


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192])
def test_block_size_that_is_not_allowed(block_size):
    with pytest.raises(UserError, match=f"block_size {block_size} is not allowed; allowed: 32, 64"):
        quantize(np.ones((64, 8), np.float32), block_size=block_size)


def test_integer_weight_is_refused():
    with pytest.raises(UserError, match="float array"):
        quantize(np.ones((64, 8), np.int32))


def test_abstract_shapes_need_no_data():
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16))
    assert q.shape == (80, 8192, 28672)
    assert q.double_quant


def test_a_short_last_block_is_divided_and_not_multiplied_by_a_reciprocal():
    w = np.random.default_rng(3).normal(size=(1000, 1)).astype(np.float32)
    values, absmax = codebook("nf4"), np.abs(w).max()
    # a quotient at the midpoint of two values takes the lower value
    w[1:16, 0] = (values[1:] + values[:-1]) / 2 * absmax
    quotient = (w / absmax).astype(np.float32)
    expected = values[(quotient > (values[1:] + values[:-1]) / 2).sum(axis=-1)] * absmax
    got = np.asarray(dequantize(quantize(w, "nf4", 1024, double_quant=False)))[:, 0]
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("values", [np.linspace(1, -1, 16), np.linspace(-1, 1, 15), np.arange(16)])
def test_a_codebook_that_is_none_is_an_error(values):
    with pytest.raises(UserError, match="sixteen non-decreasing values"):
        quantize(np.ones((64, 8), np.float32), values)


def test_a_nested_block_without_scales_is_an_error():
    with pytest.raises(UserError, match="nested_block 0 is not allowed"):
        quantize(np.ones((64, 8), np.float32), nested_block=0)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_every_way_to_decode_gives_the_codebooks_own_values(lead: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    books = np.sort(random.normal(size=(*lead, 16)).astype(np.float32))
    indices = random.integers(0, 16, (*lead, 4, 2, 5), dtype=np.uint8)
    flat = indices.reshape(*lead, -1).astype(int)
    expected = np.take_along_axis(books, flat, axis=-1).reshape(indices.shape)
    for way in (look_up_codes, selected, _looked_up):
        np.testing.assert_array_equal(way(jnp.asarray(indices), jnp.asarray(books)), expected)
    pairs = jnp.asarray(15 - indices | indices << 4, jnp.int32)
    np.testing.assert_array_equal(selected(pairs, jnp.asarray(books), 4), expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_stack_is_taken_apart_by_index(double_quant):
    w = np.random.default_rng(0).normal(size=(3, 96, 40)).astype(np.float32)
    q = quantize(w, double_quant=double_quant)
    assert q[()].shape == q.shape == (3, 96, 40)
    assert q[1].shape == (96, 40)
    assert q[1:].shape == (2, 96, 40)
    np.testing.assert_array_equal(q[1].dequantize(), q.dequantize()[1])
    assert q.nbytes == 3 * q[0].nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    with pytest.raises(IndexError):
        q[0, 0]
    with pytest.raises(IndexError):
        q[0][0]


def test_a_module_holds_a_qtensor_as_data():
    class Holder(nnx.Module):
        def __init__(self, q):
            self.q = q

    q = quantize(np.ones((64, 32), np.float32))
    assert nnx.is_data(q)
    assert len(jax.tree.leaves(Holder(q))) == len(jax.tree.leaves(q))
