"""The Mosaic GPU kernels in Pallas' interpreter, and the register layouts of their operands."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from float64 import assert_product
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.kernels import matmul, matmul_many
from qlora_jax.quant import QLayer, quantize
from qlora_jax.runtime.errors import UserError

if jax.__version_info__ < (0, 11):

    def test_an_older_jax_is_refused_with_a_remedy() -> None:
        q = quantize(np.ones((64, 64), np.float32))
        with pytest.raises(UserError, match=r"needs jax 0\.11 .*take triton or xla"):
            matmul(jnp.ones((2, 64), jnp.bfloat16), q, "mosaic")
else:
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu.mma import MMALayouts
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from plain_mosaic import device_code, rounded_weight

    from qlora_jax.kernels.mosaic import kernel as mosaic
    from qlora_jax.kernels.mosaic import operand
    from qlora_jax.kernels.mosaic.operand import Operand, ThreadIndex
    from qlora_jax.kernels.mosaic.tiles import SPLIT_STEPS, TILES, MosaicTile, split_count, tile_for

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11 (Python 3.12)"
)


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic, "device_code", device_code)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield


@needs_mosaic
@pytest.mark.parametrize(("m", "k"), [(3, 1280), (20, 384), (40, 256)])
def test_every_step_of_the_pipeline_counts(interpreted, m: int, k: int) -> None:
    random = np.random.default_rng(0)
    q = quantize(random.normal(size=(k, 128)).astype(np.float32))
    x = jnp.asarray(random.normal(size=(m, k)), jnp.bfloat16)
    assert_product(matmul(x, q, "mosaic"), x, rounded_weight(q, ml_dtypes.bfloat16), "bfloat16")


@needs_mosaic
@pytest.mark.parametrize(("m", "inner"), [(3, 4096), (3, 5376), (20, 2048), (40, 1600)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_blocks_share_a_long_contraction(interpreted, m: int, inner: int, direction: str) -> None:
    """Covers equal parts, of 16 and 16 steps, and unequal parts, in 21 and 25 steps."""
    random = np.random.default_rng(0)
    shape = (inner, 128) if direction == "forward" else (128, inner)
    q = quantize(random.normal(size=shape).astype(np.float32))
    tile = tile_for(m, inner, 128, (9, 0))
    assert split_count(tile, m, inner, 128) > 1
    x = jnp.asarray(random.normal(size=(m, inner)), jnp.bfloat16)
    w = rounded_weight(q, ml_dtypes.bfloat16)
    y = jax.jit(getattr(mosaic, direction))(x, q)
    assert_product(y, x, w if direction == "forward" else w.T, "bfloat16")


@needs_mosaic
@given(m=st.integers(1, 2**14), steps=st.integers(1, 500), tiles=st.integers(1, 500))
def test_a_contraction_is_divided_while_there_are_few_blocks(
    m: int, steps: int, tiles: int
) -> None:
    tile = MosaicTile(64, 128, 64, 3, blocks=264)
    splits = split_count(tile, m, 64 * steps, 128 * tiles)
    assert splits == 1 or splits * -(-m // 64) * tiles <= tile.blocks
    assert splits == 1 or steps // splits >= SPLIT_STEPS
    assert (splits - 1) * -(-steps // splits) < steps  # no part is empty
    assert splits == 1 or splits * m * 4 < 64 * steps


@needs_mosaic
def test_several_weights_are_one_kernel() -> None:
    stacks = [quantize(np.ones((2, 256, n), np.float32)) for n in (128, 72, 64)]
    qs = [QLayer(stack, jnp.int32(1)) for stack in stacks]
    x = jnp.ones((3, 256), jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x: matmul_many(x, qs, "mosaic"))(x))
    assert text.count("mpmd_map[") == 1 or text.count("core_map[") == 1


@needs_mosaic
def test_float32_is_refused_with_a_remedy() -> None:
    q = quantize(np.ones((64, 64), np.float32))
    with pytest.raises(UserError, match=r"bfloat16 or float16, not float32; set model\.compute"):
        matmul(jnp.ones((2, 64)), q, "mosaic")


def operands() -> list["Operand"]:
    tiles = {(t.c, t.o, t.form) for tiles in TILES.values() for t in tiles}
    return [
        Operand(c, o, transposed, block_size, form)
        for c, o, form in sorted(tiles)
        for transposed in (False, True)
        for block_size in (32, 64, 128, 4096)
    ]


@needs_mosaic
def test_the_right_operand_is_where_the_ptx_manual_has_it() -> None:
    """PTX ISA, m16n8k16, B: lane 4g + t holds rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g."""
    layout = MMALayouts("bfloat16", m_warps=1).rhs
    held = operand.ownership(layout, (64, 128)).reshape(4, 32, -1)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for warp in range(4):
        columns = {8 * warp + 32 * j for j in range(4)}
        rows = {16 * s + h + e for s in range(4) for h in (0, 8) for e in (0, 1)}
        for lane in range(32):
            expected = {(r + 2 * t[lane], c + g[lane]) for r in rows for c in columns}
            assert {divmod(int(i), 128) for i in held[warp, lane]} == expected
    assert (held[..., 1::2] == held[..., ::2] + 128).all()  # pairs along the rows


@needs_mosaic
def test_every_byte_is_held_once_and_every_operand_has_a_plan() -> None:
    for op in operands():
        layout = operand.code_layout(op)
        held = operand.ownership(layout, op.codes_shape)
        assert sorted(held.reshape(-1)) == list(range(np.prod(op.codes_shape)))
        warps = op.layout("bfloat16")
        plan = operand.register_sources(op, warps)
        assert len(plan) * 2 * 128 == op.c * op.o
        k, n = op.elements(warps)
        elements = k.astype(np.int64) * 10**6 + n
        assert len(np.unique(elements)) == op.c * op.o
        assert max(found.scale_word for found in plan.values()) < np.prod(op.scale_shape)


@needs_mosaic
def test_what_threads_find_in_different_places_is_refused() -> None:
    layout = fa.TiledLayout(fa.Tiling(((8, 32), (2, 8), (1,))), (-4,), (-2, -5), -1)
    held = operand.ownership(layout, (32, 64))
    wanted = held[..., 0].copy()
    assert operand.locate(wanted, held)
    wanted[2, 7] = np.roll(wanted[2, 7], 1)
    with pytest.raises(AssertionError, match="another place"):
        operand.locate(wanted, held)


@needs_mosaic
def test_a_place_is_a_sum_over_warp_and_lane() -> None:
    lane = np.arange(32)
    index = np.array([0, 5, 5, 9])[:, None] + 3 * (lane // 4) + 7 * (lane % 4)
    assert ThreadIndex.of(index) == ThreadIndex((0, 5, 5, 9), 3, 7)
    index[1, 9] += 1
    with pytest.raises(AssertionError, match="no sum"):
        ThreadIndex.of(index)


@needs_mosaic
def test_wgmma_takes_and_gives_what_the_ptx_manual_says() -> None:
    """PTX ISA, wgmma m64, A in registers and D: the elements of lane 4g + t of warp w.

    The lane holds rows 16w + g and 16w + g + 8, and columns 2t and 2t + 1 of every eight.
    """
    held = operand.ownership(operand.WGMMA_LAYOUT, (128, 64)).reshape(4, 32, -1)
    for warp in range(4):
        for lane in range(32):
            g, t = divmod(lane, 4)
            rows = {64 * i + 16 * warp + 8 * h + g for i in (0, 1) for h in (0, 1)}
            columns = {8 * j + 2 * t + e for j in range(8) for e in (0, 1)}
            expected = {(r, c) for r in rows for c in columns}
            assert {divmod(int(i), 64) for i in held[warp, lane]} == expected


@needs_mosaic
@pytest.mark.parametrize("inner", [64, 192, 4096])
@pytest.mark.parametrize("outer", [64, 192, 4096])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_tile_divides_the_features_and_is_for_the_rows(inner, outer, capability) -> None:
    tiles = [tile_for(m, inner, outer, capability) for m in (1, 16, 17, 64, 65, 5000)]
    assert all(inner % tile.c == outer % tile.o == 0 for tile in tiles)
    assert [tile.m for tile in tiles] == sorted(tile.m for tile in tiles)
    few = 64 if capability == (9, 0) else 32
    assert tiles[1].m == (16 if inner % 256 == 0 else few)
    assert (tiles[-1].form == "wgmma") == (capability == (9, 0))
