import dataclasses
import math

import numpy as np
import pytest

from qlora_jax.quant import codebook, dequantize, quantize
from qlora_jax.quant.error import (
    code_counts,
    entropy,
    normality_rejected,
    quantization_error,
)
from qlora_jax.runtime.errors import UserError


def exact(rows, columns, step=16):
    """Makes a weight of codebook values with absmax 1 in each block: it decodes to itself."""
    values = codebook("nf4", 64)
    index = (np.arange(rows)[:, None] + np.arange(columns)) % step
    weight = values[index]
    weight[::64] = 1.0
    return weight.astype(np.float32), values


def test_values_of_the_codebook_have_no_error():
    weight, _ = exact(128, 6)
    error = quantization_error(weight, quantize(weight, "nf4", 64, False))
    assert dataclasses.astuple(error) == (0, 0, 0)


def test_the_error_of_known_moves():
    weight, _ = exact(128, 6)
    q = quantize(weight, "nf4", 64, False)
    moved = weight.copy()
    moved[3, 2] += 0.25
    moved[70, 5] -= 0.5
    error = quantization_error(moved, q)
    assert error.mse == pytest.approx((0.25**2 + 0.5**2) / weight.size, rel=1e-6)
    energy = (moved.astype(np.float64) ** 2).sum()
    assert error.relative_mse == pytest.approx((0.25**2 + 0.5**2) / energy, rel=1e-5)
    assert error.largest == 0.5


def test_normal_weights_have_the_known_error():
    """NF4 with block_size 64 has an error of 9.4% of the norm of a normal weight."""
    weight = np.random.default_rng(0).normal(size=(2, 512, 256)).astype(np.float32)
    error = quantization_error(weight, quantize(weight, "nf4", 64, False))
    own = np.asarray(dequantize(quantize(weight, "nf4", 64, False)), np.float64) - weight
    assert error.mse == pytest.approx((own**2).mean(), rel=1e-5)
    assert math.sqrt(error.relative_mse) == pytest.approx(0.0938, abs=0.002)
    # XLA may fuse decoding and subtraction, so that they round once instead of twice
    assert error.largest == pytest.approx(np.abs(own).max(), rel=2**-22)


def test_counts_leave_padding_out():
    weight, values = exact(100, 7)
    counts = code_counts(quantize(weight, "nf4", 64, False))
    expected = [int((weight == v.astype(np.float32)).sum()) for v in values]
    assert counts.tolist() == expected
    assert counts.sum() == 700


@pytest.mark.parametrize(
    ("counts", "bits"),
    [([5] * 16, 4), ([3, 0, 0, 0], 0), ([2, 1, 1], 1.5), ([1, 3], 2 - 0.75 * math.log2(3))],
)
def test_entropy(counts, bits):
    assert entropy(counts) == pytest.approx(bits, abs=1e-12)


def test_of_normal_units_the_level_is_rejected():
    weight = np.random.default_rng(1).normal(size=(200, 2000))
    deviation = math.sqrt(0.05 * 0.95 / 2000)
    assert normality_rejected(weight) == pytest.approx(0.05, abs=4 * deviation)
    assert normality_rejected(weight, block_size=64) == pytest.approx(0.05, abs=4 * deviation)
    assert normality_rejected(weight, level=0.2) == pytest.approx(0.2, abs=0.04)


def test_other_distributions_are_found():
    random = np.random.default_rng(2)
    normal, uniform = random.normal(size=(300, 40)), random.uniform(size=(300, 40))
    assert normality_rejected(uniform) == 1
    assert normality_rejected(np.zeros((50, 4))) == 1
    mixed = np.concatenate([np.zeros((300, 40)), normal], axis=1)
    assert normality_rejected(mixed) == (40 + 40 * normality_rejected(normal)) / 80


def test_a_block_does_not_cross_units():
    """Each column is normal, but scales differ: a block across columns would not be normal."""
    scale = np.where(np.arange(30) % 2, 100.0, 1.0)
    weight = np.random.default_rng(3).normal(size=(128, 30)) * scale
    assert normality_rejected(weight, block_size=64) < 0.2


def test_bad_input():
    weight = np.ones((64, 4), np.float32)
    with pytest.raises(UserError, match="but q has"):
        quantization_error(weight.T, quantize(weight, "nf4", 64, False))
    with pytest.raises(UserError, match="3 values or more, not 2"):
        normality_rejected(np.ones((2, 4)))
