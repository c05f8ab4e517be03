"""Compares our quantizer and 4-bit models with the installed bitsandbytes, on random weights.

bitsandbytes' blocks may cross the ends of rows. Both quantizers have the same blocks only if
in_features is a multiple of block_size or the weight has one row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import REASON, our_logits, ours, save, their_logits, theirs, tokens, torch, transformers

from qlora_jax.config import QuantConfig
from qlora_jax.quant import QTensor, codebook, dequantize, quantize
from qlora_jax.quant.dynamic8 import dynamic_map

F = pytest.importorskip("bitsandbytes", reason=REASON).functional
pytestmark = pytest.mark.parity

SHAPES = [(48, 64), (33, 192), (192, 576), (64, 1536), (17, 4096), (1, 1000), (1, 8192)]
"""Shapes of the weights, [out, in]."""
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
BOOKS = {"nf4": "nf4", "fp4": "fp4_bnb"}
CASES = [
    (shape, block) for shape in SHAPES for block in BLOCKS if shape[0] == 1 or shape[1] % block == 0
]
matrix = pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
kinds = pytest.mark.parametrize("kind", BOOKS)


def weight(shape: tuple[int, int], dtype: str, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Returns one random weight with zeros and outliers: [out, in] for torch, [in, out] for us."""
    random = np.random.default_rng(seed)
    w = random.standard_normal(shape, np.float32) * 0.02
    w *= np.where(random.random(shape) < 0.01, 20, 1)
    w[random.random(shape) < 0.02] = 0
    w[:, : shape[1] // 3] *= random.random((shape[0], 1)) < 0.9
    tensor = torch.from_numpy(w).to(getattr(torch, dtype))
    return tensor, array(tensor).T


def array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def their_codes(packed: torch.Tensor, count: int) -> np.ndarray:
    flat = packed.numpy().reshape(-1)
    return np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)[:count]


def our_codes(q: QTensor, kind: str) -> np.ndarray:
    """Returns our codes in bitsandbytes' flat order and numbering."""
    groups = [np.asarray(n).reshape(-1, 32, n.shape[-1]) for n in (q.codes & 15, q.codes >> 4)]
    index = np.stack(groups, axis=1).reshape(-1, q.codes.shape[-1])[: q.in_features]
    order = np.argsort(F.get_4bit_type(kind, device="cpu").numpy(), kind="stable")
    return order[index.T.reshape(-1)]


@matrix
@dtypes
@kinds
def test_single_quantization_is_bit_equal(shape, block, dtype, kind):
    tensor, w = weight(shape, dtype, seed=block)
    packed, state = F.quantize_4bit(tensor, blocksize=block, quant_type=kind)
    q = quantize(w, BOOKS[kind], block, double_quant=False)
    np.testing.assert_array_equal(our_codes(q, kind), their_codes(packed, tensor.numel()))
    np.testing.assert_array_equal(np.asarray(q.scales).T.reshape(-1), state.absmax.numpy())
    values = jax.jit(dequantize, static_argnums=1)(q, w.dtype)
    np.testing.assert_array_equal(values, array(F.dequantize_4bit(packed, state)).T)


@matrix
@dtypes
@kinds
def test_double_quantization_is_next_to_theirs(shape, block, dtype, kind):
    tensor, w = weight(shape, dtype, seed=block + 1)
    packed, state = F.quantize_4bit(
        tensor, blocksize=block, quant_type=kind, compress_statistics=True
    )
    q = quantize(w, BOOKS[kind], block, double_quant=True)
    np.testing.assert_array_equal(our_codes(q, kind), their_codes(packed, tensor.numel()))
    offsets = np.stack([np.float32(q.offset), state.offset.numpy()]).view(np.int32)
    assert abs(int(offsets[0]) - int(offsets[1])) <= 2
    codes = np.asarray(q.scales).T.reshape(-1).astype(int)
    assert np.abs(codes - state.absmax.numpy()).max() <= 1

    nb, n = q.scales.shape
    read = dataclasses.replace(
        q,
        scales=jnp.asarray(state.absmax.numpy().reshape(n, nb).T),
        nested=jnp.asarray(state.state2.absmax.numpy()),
        offset=jnp.asarray(state.offset.numpy()).reshape(()),
    )
    values = jax.jit(dequantize, static_argnums=1)(read, w.dtype)
    np.testing.assert_array_equal(values, array(F.dequantize_4bit(packed, state)).T)


def test_tables_are_theirs():
    for signed in (True, False):
        expected = F.create_dynamic_map(signed=signed).numpy()
        np.testing.assert_array_equal(dynamic_map(signed), expected)
    for kind, name in BOOKS.items():
        values = F.get_4bit_type(kind, device="cpu").numpy()
        np.testing.assert_array_equal(codebook(name), np.sort(values))


@pytest.mark.parametrize(("double_quant", "tolerance"), [(False, 1e-4), (True, 5e-3)])
@pytest.mark.parametrize("model_kind", ["llama", "qwen2", "mistral"])
@kinds
def test_quantized_models_have_the_same_logits(tmp_path, model_kind, kind, double_quant, tolerance):
    """Double quantization needs a larger tolerance: a scale's 8-bit code may differ by one."""
    folder = save(tmp_path / "model", model_kind, seed=3)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    # train(): in evaluation mode bitsandbytes may repack the weights and compute in bfloat16.
    peer = theirs(folder, quantization_config=config, device_map={"": "cpu"}).train()
    model = ours(folder, QuantConfig(codebook=BOOKS[kind], double_quant=double_quant))
    ids = tokens(model, seed=3)
    expected = their_logits(peer, ids)
    assert np.abs(our_logits(ours(folder), ids) - expected).max() > 10 * tolerance
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=tolerance, rtol=0)
