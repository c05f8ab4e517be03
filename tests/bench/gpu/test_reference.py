"""Tests the NumPy reference for products: it agrees with the quantizer and finds wrong results."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from selection import mostly_slow

from qlora_jax.bench.gpu import reference
from qlora_jax.quant import CODEBOOKS, dequantize, quantize
from qlora_jax.quant.qtensor import block_scales

DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
M, K, N = 40, 200, 136


@pytest.mark.quick
@pytest.mark.parametrize("double", mostly_slow([True, False], True))
@pytest.mark.parametrize(
    "codebook",
    mostly_slow(sorted(CODEBOOKS), "nf4"),
)
def test_it_decodes_to_the_same_bits(codebook: str, double: bool) -> None:
    w = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)
    for block in (32, 64, 4096):
        q = quantize(w, codebook, block, double)
        assert np.array_equal(reference.decoded(q), np.asarray(dequantize(q)))


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return request.param


@pytest.fixture
def operands(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, the decoded W, and x @ W with the roundings of Mosaic's kernels."""
    source = np.random.default_rng(1)
    q = quantize(source.normal(size=(K, N)).astype(np.float32))
    weight, x = reference.decoded(q), source.normal(size=(M, K)).astype(dtype)
    scales = np.repeat(np.asarray(block_scales(q)), 64, axis=0)[:K]
    parts = [part.astype(dtype).astype(np.float32) for part in (weight / scales, scales)]
    rounded = (parts[0] * parts[1]).astype(dtype).astype(np.float64)
    return x, weight, (x.astype(np.float64) @ rounded).astype(np.float32).astype(dtype)


def test_three_roundings_are_right(operands: tuple, dtype: np.dtype) -> None:
    x, weight, y = operands
    verdict = reference.judge(y, x, weight, 0)
    assert verdict.right
    assert 1 < verdict.mean < 1.6


def test_a_16_bit_gemm_is_the_unit(operands: tuple, dtype: np.dtype) -> None:
    x, weight, _ = operands
    exact = x.astype(np.float64) @ weight.astype(dtype).astype(np.float64)
    verdict = reference.judge(reference.rounded_to(exact, dtype).astype(dtype), x, weight, 0)
    assert (verdict.right, verdict.mean, verdict.worst) == (True, 1.0, 1.0)


def test_what_is_wrong_is_seen(operands: tuple, dtype: np.dtype) -> None:
    x, weight, y = operands

    def wrong(change) -> bool:
        changed = y.astype(np.float32)
        change(changed)
        return not reference.judge(changed.astype(dtype), x, weight, 0).right

    def tile(a: np.ndarray) -> None:
        a[16:32, 64:128] = 0

    def one_row(a: np.ndarray) -> None:
        # Not the first or last row, nor a row that is compared element by element.
        a[5, :64] = a[6, :64]

    def percents(a: np.ndarray) -> None:
        a *= 1.02

    def missing(a: np.ndarray) -> None:
        a[-1, -1] = np.nan

    assert all(wrong(change) for change in (tile, one_row, percents, missing))
    assert not wrong(lambda a: None)


def test_tf32_keeps_ten_bits() -> None:
    one = np.array([1, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-12, -1 - 2**-10], np.float32)
    expected = [1, 1 + 2**-10, 1, 1 + 2**-10, -1 - 2**-10]
    assert reference.to_16_bits(one, np.dtype(np.float32)).tolist() == expected


def test_any_two_results_against_an_exact_one() -> None:
    exact = jnp.linspace(-1, 1, 999)
    theirs = exact + 0.001
    assert reference.agree(exact - 0.0019, theirs, exact).right
    assert not reference.agree(exact - 0.0021, theirs, exact).right
    assert not reference.agree(exact.at[3].set(jnp.nan), theirs, exact).right
    assert not reference.agree(theirs.at[3].add(0.002), theirs, exact).right
