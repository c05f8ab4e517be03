"""Columns taken from a 4-bit matrix decode to the same bits as in the whole matrix."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.quant import dequantize, quantize
from qlora_jax.quant.columns import columns


@settings(max_examples=6, deadline=None)
@given(
    k=st.sampled_from([32, 96, 128, 130]),
    n=st.sampled_from([1, 7, 300]),
    double_quant=st.booleans(),
    block_size=st.sampled_from([32, 64, 128]),
    nested_block=st.sampled_from([3, 256]),
    seed=st.integers(0, 9),
)
def test_columns(k, n, double_quant, block_size, nested_block, seed):
    w = np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)
    q = quantize(w, block_size=block_size, double_quant=double_quant, nested_block=nested_block)
    index = np.random.default_rng(seed + 1).integers(0, n, 11)
    found = jax.jit(lambda q, i: dequantize(columns(q, i)))(q, index)
    np.testing.assert_array_equal(found, np.asarray(jax.jit(dequantize)(q))[:, index])
