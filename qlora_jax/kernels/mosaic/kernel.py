"""Product kernels that decode inside the product, in Pallas Mosaic GPU (jax 0.11, sm_80 and newer).

One source serves Ampere to Blackwell. A pipeline copies tiles of the left operand and of the codes
to shared memory. The codes are decoded in registers, directly in the layout of the tensor cores'
operand. `mma`, or `wgmma` on Hopper, accumulates in float32. The backward pass uses the same kernel
with the transposed weight. Codebook, scales and their product are each rounded to the compute
dtype.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qlora_jax.runtime.errors import UserError

if jax.__version_info__ < (0, 11):
    raise UserError(
        f"implementation mosaic needs jax 0.11 and Python 3.12, not jax {jax.__version__}; "
        "take triton or xla"
    )

from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import fragments, results
from qlora_jax.kernels.mosaic.operand import Operand
from qlora_jax.kernels.mosaic.scales import Scales, aside_shape
from qlora_jax.kernels.mosaic.tiles import MosaicTile, split_count, tile_for
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import QTensor
from qlora_jax.quant.stack import QLayer, as_qtensor

DTYPES = ("bfloat16", "float16")
PREFETCH = 8
"""Number of steps ahead at which a scale's code is prefetched into the level 2 cache. On an H200, 3
and 16 were not faster."""
EDGE = 64
"""Columns of W must be a multiple of this; other weights are padded, which copies the codes."""
REF, SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
"""Argument types of device code: a reference and a scalar."""


def forward(x: jax.Array, q: QTensor | QLayer) -> jax.Array:
    """Returns x @ W, [..., K] to [..., N] in x's dtype, accumulated in float32."""
    return _products(x, [q], transposed=False)[0]


def backward(g: jax.Array, q: QTensor | QLayer) -> jax.Array:
    """Returns g @ W.T, [..., N] to [..., K] in g's dtype, accumulated in float32."""
    return _products(g, [q], transposed=True)[0]


def several(x: jax.Array, qs: Sequence[QTensor | QLayer]) -> list[jax.Array]:
    """Returns `forward(x, q)` for each weight, bit for bit, from one launch.

    Args:
      x: input, [..., K].
      qs: weights with the same K, block size and format of scales. If they need different tiles,
        each weight has its own launch.
    """
    return _products(x, qs, transposed=False)


def _products(left: jax.Array, qs: Sequence[QTensor | QLayer], transposed: bool) -> list[jax.Array]:
    if left.dtype not in DTYPES:
        raise UserError(
            f"implementation mosaic computes in {' or '.join(DTYPES)}, not {left.dtype}; "
            "set model.compute_dtype, or take triton or xla"
        )
    lead, features = left.shape[:-1], [q.shape[0 if transposed else 1] for q in qs]
    if 0 in left.shape:
        return [jnp.zeros((*lead, n), left.dtype) for n in features]
    rows = left.reshape(math.prod(lead), -1)
    stacks, places = zip(*map(_stack, qs))
    kernels = [_kernel(rows, stack, transposed) for stack in stacks]
    if len({kernel.tile for kernel in kernels}) > 1:
        return [y for q in qs for y in _products(left, [q], transposed)]
    padded = _pad(rows, _up(rows.shape[0], kernels[0].tile.m), kernels[0].inner)
    found = launch(kernels, padded, list(map(_weight, stacks, places)))
    sums = [y.sum(0).astype(left.dtype) if y.shape[0] > 1 else y[0] for y in found]
    return [y[: rows.shape[0], :n].reshape(*lead, n) for y, n in zip(sums, features)]


def _stack(q: QTensor | QLayer) -> tuple[QTensor, jax.Array]:
    """Returns a stack whose columns are a multiple of EDGE, and the matrix's index, int32[1]."""
    if isinstance(q, QLayer) and q.shape[1] % EDGE == 0:
        return q.stack, q.layer.astype(jnp.int32)[None]
    q = as_qtensor(q)  # slice first, so that only one layer is padded and not the whole stack
    n = _up(q.shape[1], EDGE)
    codes, scales = (_pad(leaf, leaf.shape[0], n) for leaf in (q.codes, q.scales))
    alone = dataclasses.replace(q, codes=codes, scales=scales)
    return jax.tree.map(lambda leaf: leaf[None], alone), jnp.zeros(1, jnp.int32)


def _kernel(rows: jax.Array, stack: QTensor, transposed: bool) -> "MosaicKernel":
    k, n = 2 * stack.codes.shape[1], stack.codes.shape[2]
    inner, outer = (n, k) if transposed else (k, n)
    tile = tile_for(rows.shape[0], inner, outer, utils._infer_arch())
    operand = Operand(tile.c, tile.o, transposed, stack.block_size, tile.form)
    splits = split_count(tile, rows.shape[0], inner, outer)
    return MosaicKernel(tile, operand, rows.dtype, inner, outer, stack.nested_block, splits)


class StackedWeight(NamedTuple):
    """The arrays of a stack of weights, and the index of the weight that a kernel multiplies.

    Attributes:
      layer: index of the weight, int32[1].
      codes: packed codes, uint8[L * Kp / 2, N].
      codebook: values of the codes, float32[L, 16].
      scales: stored scales [L, nb, N]; with double quantization also nested [L, ...], offset [L]
        and the dynamic map [256].
    """

    layer: jax.Array
    codes: jax.Array
    codebook: jax.Array
    scales: tuple[jax.Array, ...]


def _weight(stack: QTensor, layer: jax.Array) -> StackedWeight:
    scales: tuple[jax.Array, ...] = (stack.scales,)
    if stack.nested is not None and stack.offset is not None:
        scales = stack.scales, stack.nested, stack.offset, jnp.asarray(dynamic_map())
    codes = stack.codes.reshape(-1, stack.codes.shape[2])
    return StackedWeight(layer, codes, stack.codebook, scales)


def launch(
    kernels: Sequence["MosaicKernel"], left: jax.Array, weights: Sequence[StackedWeight]
) -> list[jax.Array]:
    """Returns left @ weight for each weight [C, outer], in one launch.

    Args:
      kernels: kernel of each weight; all have the same tile, operand and dtype.
      left: left operand, [M, C]; M is a multiple of the tile's rows.
      weights: right operands.

    Returns:
      Product with each weight, [splits, M, outer]: partial sums in float32; if there is only one
      part, the product in the kernel's dtype.
    """
    first, rows = kernels[0], left.shape[0]
    leaves, tree = jax.tree.flatten(list(weights))
    ends = list(itertools.accumulate(kernel.blocks for kernel in kernels))
    count = len(weights[0].scales)

    def block(left: Any, *references: Any) -> None:
        own = jax.tree.unflatten(tree, references[: len(leaves)])
        outs = references[len(leaves) : len(leaves) + len(kernels)]
        scratch = references[len(leaves) + len(kernels) :]
        m, b = lax.axis_index("m"), lax.axis_index("b")
        for kernel, weight, out, end in zip(kernels, own, outs, ends):
            begin = end - kernel.blocks
            run = functools.partial(kernel.block, left, weight, out, scratch, m, b - begin)
            if len(kernels) == 1:
                run()
            else:
                pl.when((b >= begin) & (b < end))(run)

    call = plgpu.kernel(
        block,
        out_type=[
            jax.ShapeDtypeStruct((kernel.splits * rows, kernel.outer), kernel.out_dtype)
            for kernel in kernels
        ],
        grid=(rows // first.tile.m, ends[-1]),
        grid_names=("m", "b"),
        scratch_types=[
            plgpu.SMEM(fragments.TABLE, jnp.int32),
            plgpu.SMEM((2, *first.operand.scale_shape), first.scale_dtype),
            plgpu.SMEM(aside_shape(first.operand, count), jnp.int32),
        ],
    )
    found = call(left, *leaves)
    return [y.reshape(kernel.splits, rows, kernel.outer) for kernel, y in zip(kernels, found)]


@dataclasses.dataclass(frozen=True)
class MosaicKernel:
    """The static description of one compiled product: all except the data and the number of rows.

    Attributes:
      tile: part of the product that one thread block computes.
      operand: right operand of a step.
      dtype: dtype of the left operand and of the result.
      inner: contraction features, a multiple of the tile's c.
      outer: output features, a multiple of the tile's o.
      nested_block: scales per nested scale.
      splits: number of parts of the contraction, each for one thread block (split-K).
    """

    tile: MosaicTile
    operand: Operand
    dtype: Any
    inner: int
    outer: int
    nested_block: int
    splits: int = 1

    @property
    def steps(self) -> int:
        """Number of steps along the contraction."""
        return self.inner // self.tile.c

    @property
    def blocks(self) -> int:
        """Number of thread blocks per tile of rows."""
        return self.outer // self.tile.o * self.splits

    @property
    def scale_dtype(self) -> Any:
        """Dtype of the scales in shared memory; see `Operand.scale_shape`."""
        return self.dtype if self.operand.transposed else jnp.int32

    @property
    def out_dtype(self) -> Any:
        """Dtype of the kernel's result: float32 if the contraction is split, else `dtype`."""
        return jnp.dtype(jnp.float32) if self.splits > 1 else self.dtype

    @property
    def left_tiling(self) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
        """Tiling and swizzle of the left operand in shared memory."""
        return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    @property
    def code_tiling(self) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
        """Tiling and swizzle of the codes in shared memory."""
        width = self.operand.code_swizzle
        return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)

    @property
    def accumulator(self) -> plgpu.ShapeDtypeStruct:
        """Shape, dtype and register layout of the sums."""
        if self.operand.form == "wgmma":
            shape = (self.tile.o, self.tile.m)
            return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
        warps = self.operand.m_warps
        layout = plgpu.Layout.MMA_ACC(self.dtype, m_warps=warps)
        shape = (warps * self.tile.m, self.tile.o)
        return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    def block(
        self, left: Any, weight: StackedWeight, out: Any, scratch: Sequence[Any], m: Any, b: Any
    ) -> None:
        """Computes and writes the result of thread block b of row tile m.

        All arguments except m and b are references.
        """
        _, codes, codebook, scales = weight
        table, slots, aside = scratch
        tile, acc, count = self.tile, self.accumulator, len(scales)
        o, s = (b, 0) if self.splits == 1 else (b // self.splits, b % self.splits)
        first, steps = self._steps_of(s)
        layer = weight.layer[0]
        before = layer * (codes.shape[0] // codebook.shape[0] // self.operand.codes_shape[0])
        prepare, multiply, finish = device_code(self, count)

        def step(index: Any, left_tile: Any, code_tile: Any, total: jax.Array) -> jax.Array:
            now, later = slots.at[index[0] % 2], slots.at[(index[0] + 1) % 2]
            i = first + index[0]
            places = layer, o, i
            return multiply(left_tile, code_tile, table, now, later, aside, scales, *places, total)

        prepare(codebook, table, slots.at[0], aside, scales, layer, o, first)
        transposed = self.operand.transposed
        pipeline = plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[
                _spec((tile.m, tile.c), lambda i: (m, first + i), self.left_tiling),
                _spec(
                    self.operand.codes_shape,
                    lambda i: (before + o, first + i) if transposed else (before + first + i, o),
                    self.code_tiling,
                ),
            ],
            max_concurrent_steps=tile.stages,
            init_carry=plgpu.layout_cast(jnp.zeros(acc.shape, jnp.float32), acc.layout),
        )
        tiles = out.shape[0] // self.splits // tile.m
        finish(pipeline(left, codes), table, out, s * tiles + m, o)

    def _steps_of(self, split: Any) -> tuple[Any, Any]:
        """Returns the first step and the number of steps of a part of the contraction."""
        if self.splits == 1:
            return 0, self.steps
        each = -(-self.steps // self.splits)
        first = split * each
        if self.steps % self.splits == 0:
            return first, each
        return first, jnp.minimum(each, self.steps - first)


class DeviceCode(NamedTuple):
    """The parts of a thread block's work that are written per thread, as functions of references.

    Attributes:
      prepare: function of (codebook, table, slot, aside, scales, layer, o, first). It fills the
        table of pairs and the scales of step `first`, and stores the encoded scales of the next
        step in `aside`.
      multiply: function of (left, codes, table, now, later, aside, scales, layer, o, i, total). It
        adds the product of step i to `total` with the scales in `now`, and writes the scales of
        step i + 1 to `later`.
      finish: function of (total, table, out, m, o). It writes tile (m, o) of `out` and may
        overwrite the table.
    """

    prepare: Callable[..., None]
    multiply: Callable[..., jax.Array]
    finish: Callable[..., None]


def device_code(kernel: MosaicKernel, count: int) -> DeviceCode:
    """Returns the device code of a kernel whose QTensor has `count` arrays of scales.

    A scale's code is loaded from device memory, and then the code selects a value of the dynamic
    map. So that no step waits for these loads, they run in three different steps. PREFETCH steps
    ahead, the code and the nested scale are prefetched into the level 2 cache. Two steps ahead, the
    block loads them. One step ahead, the scale is decoded.
    """
    return DeviceCode(_prepare(kernel, count), _multiply(kernel, count), _finish(kernel))


def _prepare(kernel: MosaicKernel, count: int) -> Callable[..., None]:
    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, (REF,) * count, SCALAR, SCALAR, SCALAR))
    def prepare(
        _: Any,
        codebook: Any,
        table: Any,
        slot: Any,
        aside: Any,
        references: Any,
        layer: Any,
        o: Any,
        first: Any,
    ) -> tuple[()]:
        element = utils.dtype_to_ir_type(kernel.dtype)
        place, tile, step = (scalar.registers.item() for scalar in (layer, o, first))
        scales = _scales(kernel, references, place)
        now, later = (scales.fetch(tile, step, ahead) for ahead in range(2))
        for ahead in range(2, PREFETCH):
            scales.prefetch(tile, step, ahead)
        fragments.fill_table(table, codebook, place, element)
        scales.store(scales.values(now), slot, element)
        scales.put_aside(later, aside)
        utils.warpgroup_barrier()
        return ()

    return prepare


def _multiply(kernel: MosaicKernel, count: int) -> Callable[..., jax.Array]:
    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(kernel.left_tiling),
            plgpu.RefType(kernel.code_tiling),
            *(REF, REF, REF, REF, (REF,) * count, SCALAR, SCALAR, SCALAR),
            kernel.accumulator.layout,
        ),
        return_type=kernel.accumulator,
    )
    def multiply(
        _: Any,
        left: Any,
        codes: Any,
        table: Any,
        now: Any,
        later: Any,
        aside: Any,
        references: Any,
        layer: Any,
        o: Any,
        i: Any,
        total: Any,
    ) -> Any:
        element = utils.dtype_to_ir_type(kernel.dtype)
        place, tile, step = (scalar.registers.item() for scalar in (layer, o, i))
        scales = _scales(kernel, references, place)
        scales.prefetch(tile, step, PREFETCH)
        second = scales.fetch(tile, step, 2)
        first = scales.take_back(aside)

        def scales_of_next() -> None:
            scales.store(scales.values(first), later, element)
            scales.put_aside(second, aside)

        right = fragments.weights(kernel.operand, codes, table, now, element)
        total = fragments.product(kernel.operand, total, left, right, scales_of_next)
        # the next step reads these scales, and its copies may overwrite the tiles of this step
        utils.warpgroup_barrier()
        return total

    return multiply


def _finish(kernel: MosaicKernel) -> Callable[..., None]:
    @plgpu.inline_mgpu(arg_types=(kernel.accumulator.layout, REF, REF, SCALAR, SCALAR))
    def finish(_: Any, total: Any, scratch: Any, out: Any, m: Any, o: Any) -> tuple[()]:
        element = utils.dtype_to_ir_type(kernel.out_dtype)
        tile = m.registers.item(), o.registers.item()
        results.store(kernel.operand, total, scratch, out, *tile, element)
        return ()

    return finish


def _scales(kernel: MosaicKernel, references: Any, layer: Any) -> Scales:
    arrays = (*references, None, None, None)[:4]
    return Scales(kernel.operand, kernel.steps, layer, *arrays, kernel.nested_block)


def _spec(shape: tuple[int, int], index_map: Callable, transforms: Any) -> plgpu.BlockSpec:
    # The padding guarantees that all accesses are in bounds, which the pipelines of sm_80 require.
    # On sm_80 an untiled block would be copied with a wrong row stride, without an error.
    if not transforms:
        raise AssertionError("a block without a tiling")
    return plgpu.BlockSpec(
        shape,
        index_map,
        transforms=transforms,
        oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    if x.shape == (rows, columns):
        return x
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))
