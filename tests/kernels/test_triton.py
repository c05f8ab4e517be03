"""Grids and tiles of the Triton kernels in interpret mode; test_conformance.py has products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import to_float64

from qlora_jax.kernels import matmul, triton
from qlora_jax.kernels.triton_tiles import TILES, tile_for
from qlora_jax.quant import quantize

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "INTERPRET", True)
        yield


def kernels(jaxpr) -> list:
    """Returns the grids of the kernels in a jaxpr and in all jaxprs that it calls."""
    found = []
    for e in jaxpr.eqns:
        if e.primitive.name == "pallas_call":
            found.append(e.params["grid_mapping"].grid)
            continue
        for value in jax.tree.leaves(list(e.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += kernels(inner)
    return found


def test_a_batch_over_one_weight_is_more_rows_of_one_kernel() -> None:
    random = np.random.default_rng(0)
    q = quantize(random.normal(size=(64, 32)).astype(np.float32))
    xs = jnp.asarray(random.normal(size=(4, 16, 64)), jnp.bfloat16)

    def gradient(x):
        return jax.grad(lambda x: matmul(x, q, "triton").astype(jnp.float32).sum())(x)

    for function in (lambda x: matmul(x, q, "triton"), gradient):
        grids = kernels(jax.make_jaxpr(jax.vmap(function))(xs).jaxpr)
        assert grids
        assert all(grid[0] == 64 // tile_for(64, xs.dtype).m for grid in grids)
        assert all(len(grid) == 2 for grid in grids)
        single = [function(x) for x in xs]
        np.testing.assert_allclose(
            to_float64(jax.vmap(function)(xs)), to_float64(jnp.stack(single)), rtol=2e-2, atol=1e-2
        )


@pytest.mark.parametrize("itemsize", TILES)
def test_tiles_grow_with_m(itemsize: int) -> None:
    dtype = {2: "bfloat16", 4: "float32"}[itemsize]
    picked = [tile_for(m, dtype) for m in (1, 16, 17, 64, 5000)]
    assert picked == sorted(picked)
    assert picked[0].m == 16
    assert picked[-1] == TILES[itemsize][-1]
