"""Our quantizer against bitsandbytes', bit for bit, in the cases where both rules agree.

The rules agree if in_features is a multiple of block_size or if the weight has one row. Values at
the edge of float32's range (`EXTREME`) are left out, because XLA:CPU flushes subnormals to zero.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import codebook, dequantize, quantize
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import block_scales

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "bnb.npz")
FOLDERS = sorted({k.rpartition("/")[0] for k in GOLDEN.files if k.count("/") == 2})
EXTREME = ("tiny.", "subnormal.", "huge.")
COMPARED = [f for f in FOLDERS if not f.startswith(EXTREME)]
# Most models have bfloat16 weights and block_size 64; the other cases are slow tests.
CASES = [
    pytest.param(f, marks=() if re.search("bf16/.*b64$", f) else pytest.mark.slow) for f in COMPARED
]
SINGLE, DOUBLE = 96, 96
BOOKS = {"nf4": "nf4", "fp4": "fp4_bnb"}


def weight(folder: str) -> np.ndarray:
    """Returns W in our layout, [in, out], in the case's dtype."""
    case = folder.split("/")[0]
    return view(case, GOLDEN[f"{case}/input"])


def view(case: str, array: np.ndarray) -> np.ndarray:
    array = array.reshape(-1, array.shape[-1]).T
    return array.view(jnp.bfloat16) if case.endswith("bf16") else array


def quantized(folder: str, double_quant: bool):
    kind, block = folder.split("/")[1].split(".b")
    return quantize(weight(folder), BOOKS[kind], int(block), double_quant)


def bnb_codes(q) -> np.ndarray:
    """Returns our codes in bitsandbytes' flat order and numbering."""
    groups = [np.asarray(n).reshape(-1, 32, n.shape[-1]) for n in (q.codes & 15, q.codes >> 4)]
    index = np.stack(groups, axis=1).reshape(-1, q.codes.shape[-1])[: q.in_features]
    values = np.asarray(q.codebook)
    if values[7] == values[8]:
        order = np.argsort(GOLDEN["code_fp4"], kind="stable")
    else:
        order = np.arange(16)
    return order[index.T.reshape(-1)]


def test_golden_file_holds_every_case():
    double = [f for f in COMPARED if f"{f}/offset" in GOLDEN.files]
    print(f"comparing {len(COMPARED)} single and {len(double)} double quantization cases")
    assert len(COMPARED) >= SINGLE
    assert len(double) >= DOUBLE


@pytest.mark.parametrize("folder", CASES)
def test_single_quantization_is_bit_equal(folder):
    q = quantized(folder, double_quant=False)
    packed = GOLDEN[f"{folder}/packed"]
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: np.prod(q.shape)]
    np.testing.assert_array_equal(bnb_codes(q), codes)
    np.testing.assert_array_equal(np.asarray(q.scales).T.reshape(-1), GOLDEN[f"{folder}/absmax"])
    w = weight(folder)
    values = jax.jit(dequantize, static_argnums=1)(q, w.dtype)
    expected = view(folder.split("/")[0], GOLDEN[f"{folder}/deq"])
    np.testing.assert_array_equal(np.asarray(values), expected)


@pytest.mark.parametrize("folder", CASES)
def test_double_quantization_reads_bitsandbytes_scales_and_stays_next_to_them(folder):
    q = quantized(folder, double_quant=True)
    ours, offset = np.float32(q.offset), np.float32(GOLDEN[f"{folder}/offset"])
    assert abs(int(ours.view(np.int32)) - int(offset.view(np.int32))) <= 2
    codes = np.asarray(q.scales).T.reshape(-1).astype(int)
    assert np.abs(codes - GOLDEN[f"{folder}/absmax_u8"]).max() <= 1

    nb, n = q.scales.shape
    theirs = dataclasses.replace(
        q,
        scales=jnp.asarray(GOLDEN[f"{folder}/absmax_u8"].reshape(n, nb).T),
        nested=jnp.asarray(GOLDEN[f"{folder}/nested_absmax"]),
        offset=jnp.asarray(GOLDEN[f"{folder}/offset"]).reshape(()),
    )
    scales = jax.jit(block_scales)(theirs)
    np.testing.assert_array_equal(np.asarray(scales).T.reshape(-1), GOLDEN[f"{folder}/absmax_deq"])
    values = jax.jit(dequantize, static_argnums=1)(theirs, weight(folder).dtype)
    expected = view(folder.split("/")[0], GOLDEN[f"{folder}/deq_dq"])
    np.testing.assert_array_equal(np.asarray(values), expected)


def test_tables_are_bitsandbytes():
    np.testing.assert_array_equal(dynamic_map(), GOLDEN["code_dynamic8"])
    np.testing.assert_array_equal(codebook("nf4"), GOLDEN["code_nf4"])
    np.testing.assert_array_equal(codebook("fp4_bnb"), np.sort(GOLDEN["code_fp4"]))
