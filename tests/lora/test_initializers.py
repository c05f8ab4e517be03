"""The low-rank approximation of PiSSA and LoftQ, and LoftQ against its algorithm in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.initializers import decompose as splits
from qlora_jax.lora.initializers.decompose import InitInput, best_low_rank, error
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.quant import quantize, to_float32

pytestmark = pytest.mark.quick


def matrix(k, n, seed=0):
    """Makes a matrix whose singular values are 10 * 0.9^i."""
    random = np.random.default_rng(seed)
    u, _ = np.linalg.qr(random.normal(size=(k, min(k, n))))
    v, _ = np.linalg.qr(random.normal(size=(n, min(k, n))))
    return (u * 10 * 0.9 ** np.arange(min(k, n))) @ v.T


@pytest.mark.parametrize("shape", [(96, 64), (40, 96)])
@pytest.mark.parametrize("exact", [True, False])
def test_the_best_approximation_either_way(monkeypatch, shape, exact):
    w, rank, scale = matrix(*shape), 5, 0.25
    if not exact:
        monkeypatch.setattr(splits, "EXACT", 1)
        monkeypatch.setattr(splits, "OVERSAMPLED", 8)
    best_low_rank.clear_cache()  # a traced program holds EXACT and OVERSAMPLED as constants
    a, b = (
        np.asarray(x, np.float64)
        for x in best_low_rank(jnp.asarray(w, "float32"), rank, scale, "float32")
    )
    u, s, vt = np.linalg.svd(w)
    np.testing.assert_allclose(scale * a @ b, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.sqrt(s[:rank] / scale), rtol=1e-4)


def test_a_rank_above_the_full_one_leaves_zeros():
    a, b = best_low_rank(jnp.asarray(matrix(8, 6), "float32"), 9, 2.0, "float32")
    assert (a.shape, b.shape) == ((8, 9), (9, 6))
    assert not np.asarray(a)[:, 6:].any()
    np.testing.assert_allclose(2 * np.asarray(a @ b), matrix(8, 6), atol=1e-4)


@pytest.mark.parametrize("codebook", ["nf4", "int4", "fp4_e2m1"])
@pytest.mark.parametrize("turns", [1, 3])
def test_loftq_alternates_as_in_the_paper(codebook, turns):
    w = np.random.default_rng(1).normal(size=(128, 48)).astype(np.float32)
    rank, scale = 6, 0.5

    def store(x):
        return quantize(x, codebook, 64, False)

    spec = AdapterSpec(rank, scale * rank, scale)
    task = InitInput(jnp.asarray(w), spec, jnp.dtype("float32"), store, turns)
    stored, adapter = INITIALIZERS["loftq"](task)
    low = np.zeros_like(w)
    for _ in range(turns):
        q = np.asarray(jax.jit(to_float32)(store(jnp.asarray(w - low))))
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        low = ((u[:, :rank] * s[:rank]) @ vt[:rank]).astype(np.float32)
    found = np.asarray(jax.jit(to_float32)(stored))
    # a weight that is halfway between two codes, within rounding, may get either
    assert (np.abs(found - q) > 1e-5).mean() < 2e-3
    loss = np.linalg.norm(w - q - low) / np.linalg.norm(w)
    assert error(task.weight, stored, adapter) == pytest.approx(loss, rel=1e-3)


def test_narrow_adapters_leave_their_rounding_to_the_base():
    w = jnp.asarray(matrix(64, 64), "float32")
    task = InitInput(w, AdapterSpec(4, 8.0, 2.0), jnp.dtype("bfloat16"), lambda x: x, 1)
    stored, adapter = INITIALIZERS["pissa"](task)
    assert adapter.a.dtype == jnp.bfloat16
    assert error(w, stored, adapter) < 1e-6
