"""Compiled Mosaic kernels in the emulator: launch parameters and operand order are correct."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ptx_compile import kernels

from qlora_jax.gpu.compile import has_plugin

pytestmark = [
    pytest.mark.skipif(not has_plugin(), reason="needs the compile-only packages: make gpu-check"),
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic kernels need jax 0.11"),
]

M, K, N = 128, 192, 64


def product(x, w, bias):
    """Computes x [M, K] @ w [K, N] + bias [N] in tiles of 64 rows; loads overlap with products."""
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    layout = plgpu.Layout.MMA_ACC(jnp.bfloat16)

    def kernel(bias, w, x, y):
        row = lax.axis_index("m")

        def step(_, x, w, total):
            left = plgpu.load(x, layout=plgpu.Layout.MMA_LHS(jnp.bfloat16))
            return plgpu.mma(total, left, plgpu.load(w, layout=plgpu.Layout.MMA_RHS(jnp.bfloat16)))

        total = plgpu.emit_pipeline(
            step,
            grid=(K // 64,),
            max_concurrent_steps=2,
            init_carry=plgpu.layout_cast(jnp.zeros((64, N), jnp.float32), layout),
            in_specs=[
                plgpu.BlockSpec((64, 64), lambda k: (row, k), transforms=tile),
                plgpu.BlockSpec((64, N), lambda k: (k, 0), transforms=tile),
            ],
        )(x, w)
        added = plgpu.load(bias, layout=layout.reduce(0), optimized=False)
        total = total + lax.broadcast_in_dim(added, (64, N), (1,))
        y[pl.ds(row * 64, 64), :] = total

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), jnp.float32),
        grid=(M // 64,),
        grid_names=("m",),
    )(bias, w, x)


def test_a_product_in_tiles() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((M, K), (K, N))]
    (kernel,) = kernels(product, *shapes, jax.ShapeDtypeStruct((N,), jnp.float32)).values()
    assert kernel.grid == (2, 1, 1)
    assert kernel.block == (128, 1, 1)
    assert sorted(kernel.order) == [0, 1, 2, 3]
    random = np.random.default_rng(4)
    x = random.normal(size=(M, K)).astype(ml_dtypes.bfloat16)
    w = random.normal(size=(K, N)).astype(ml_dtypes.bfloat16)
    bias = random.normal(size=N).astype(np.float32)
    y = np.full((M, N), np.nan, np.float32)
    kernel.run(bias, w, x, y)
    wide = [a.astype(np.float64) for a in (x, w)]
    size = np.abs(wide[0]) @ np.abs(wide[1]) + np.abs(bias)
    assert np.all(np.abs(y - (wide[0] @ wide[1] + bias)) <= K * 2.0**-24 * size)
