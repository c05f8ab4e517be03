import numpy as np
import pytest
from scipy import integrate, stats
from selection import mostly_slow

from qlora_jax.quant import CODEBOOKS, codebook, derive_nf4
from qlora_jax.runtime.errors import UserError


@pytest.mark.parametrize("name", CODEBOOKS)
def test_sixteen_ordered_values_with_zero_and_both_ends(name):
    values = codebook(name)
    assert values.shape == (16,)
    assert values.dtype == np.float32
    assert np.all(np.diff(values) >= 0)
    assert values[0] == -1
    assert values[-1] == 1
    assert 0 in values


def test_nf4_is_derived_from_normal_quantiles():
    np.testing.assert_allclose(derive_nf4(), codebook("nf4"), rtol=0, atol=1e-6)


def test_nf4_derivation_against_scipy():
    ends = stats.norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1]) / stats.norm.ppf(0.9677083)
    np.testing.assert_allclose(derive_nf4()[8:], np.sort(ends), atol=1e-6)


def test_the_two_four_bit_floats_differ():
    assert not np.array_equal(codebook("fp4_bnb"), codebook("fp4_e2m1"))
    np.testing.assert_allclose(codebook("fp4_e2m1")[8:] * 6, [0, 0.5, 1, 1.5, 2, 3, 4, 6])
    np.testing.assert_allclose(codebook("fp4_e3m0")[8:] * 16, [0, 0.25, 0.5, 1, 2, 4, 8, 16])


def test_int4_is_uniform_with_one_spare():
    np.testing.assert_allclose(codebook("int4") * 7, [*range(-7, 8), 7], atol=1e-6)


def expected_squared_error(values: np.ndarray, block_size: int) -> float:
    """Returns E[(x - dequantized x)²] of normal x, by quadrature over the block's absmax."""

    def given_maximum(m):
        t = np.linspace(-1, 1, 4001)
        nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, t)]
        pdf = stats.norm.pdf(t * m) * m / (2 * stats.norm.cdf(m) - 1)
        return integrate.trapezoid((t - nearest) ** 2 * pdf, t) * m**2

    grid = np.linspace(0.5, 6, 200)
    density = (
        block_size * (2 * stats.norm.cdf(grid) - 1) ** (block_size - 1) * 2 * stats.norm.pdf(grid)
    )
    return float(integrate.trapezoid([given_maximum(m) * d for m, d in zip(grid, density)], grid))


@pytest.mark.parametrize("block_size", mostly_slow([32, 64, 1024], 64))
def test_lloyd_is_a_minimum_of_the_expected_error(block_size):
    values = codebook("lloyd", block_size).astype(float)
    least = expected_squared_error(values, block_size)
    for i in set(range(16)) - {0, 7, 15}:
        for step in (-0.01, 0.01):
            moved = values.copy()
            moved[i] += step
            assert expected_squared_error(moved, block_size) > least
    assert least < expected_squared_error(codebook("nf4").astype(float), block_size)


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=r"nf5.*nf4, fp4_bnb"):
        codebook("nf5")
