"""The product fused with its decode, as Pallas Mosaic GPU kernels (jax 0.11, sm_80 and newer).

One source for Ampere to Blackwell: tiles of the left operand and of the codes arrive in shared
memory in a pipeline, the codes are decoded in registers straight into the layout of the tensor
cores' operand, and `mma`, or `wgmma` on Hopper, adds up in float32. Backward is the same kernel on
the transposed weight. Codebook and scales are rounded to the compute dtype, and so is their
product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import fragments, results
from qlora_jax.kernels.mosaic.operand import Operand
from qlora_jax.kernels.mosaic.scales import Scales, aside_shape
from qlora_jax.kernels.mosaic.tiles import Tile, split_count, tile_for
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.quant.qtensor import QTensor
from qlora_jax.quant.stack import QLayer, cut

DTYPES = ("bfloat16", "float16")
PREFETCH = 8
"""How many steps ahead a scale's code is brought to the level 2 cache. On an H200 3 and 16 took no
less time."""
EDGE = 64
"""Columns of W come in multiples of this; others are padded, which copies the codes."""
REF, SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
"""Types of device code's arguments."""


def forward(x: jax.Array, q: QTensor | QLayer) -> jax.Array:
    """x @ W: [..., K] to [..., N] in x's dtype, accumulated in float32."""
    return _product(x, q, transposed=False)


def backward(g: jax.Array, q: QTensor | QLayer) -> jax.Array:
    """g @ W.T: [..., N] to [..., K] in g's dtype, accumulated in float32."""
    return _product(g, q, transposed=True)


def _product(left: jax.Array, q: QTensor | QLayer, transposed: bool) -> jax.Array:
    if left.dtype not in DTYPES:
        raise UserError(
            f"implementation mosaic computes in {' or '.join(DTYPES)}, not {left.dtype}; "
            "set model.compute_dtype, or take triton or xla"
        )
    lead, features = left.shape[:-1], q.shape[0 if transposed else 1]
    if 0 in left.shape:
        return jnp.zeros((*lead, features), left.dtype)
    rows = left.reshape(math.prod(lead), -1)
    weight, layer = _stack(q)
    k, n = 2 * weight.codes.shape[1], weight.codes.shape[2]
    inner, outer = (n, k) if transposed else (k, n)
    tile = tile_for(rows.shape[0], inner, outer, utils._infer_arch())
    padded = _pad(rows, _up(rows.shape[0], tile.m), inner)
    operand = Operand(tile.c, tile.o, transposed, weight.block_size, tile.form)
    splits = split_count(tile, rows.shape[0], inner, outer)
    kernel = Kernel(tile, operand, left.dtype, inner // tile.c, weight.nested_block, splits)
    y = kernel(padded, layer, weight.codes, weight.codebook, _scales_of(weight), outer)
    y = y.sum(0).astype(left.dtype) if splits > 1 else y[0]
    return y[: rows.shape[0], :features].reshape(*lead, features)


def _stack(q: QTensor | QLayer) -> tuple[QTensor, jax.Array]:
    """Returns a stack whose columns are a multiple of EDGE, and the matrix's place, int32[1]."""
    if isinstance(q, QLayer) and q.shape[1] % EDGE == 0:
        return q.stack, q.layer.astype(jnp.int32)[None]
    q = cut(q)  # to be padded: not all of a stack
    n = _up(q.shape[1], EDGE)
    codes, scales = (_pad(leaf, leaf.shape[0], n) for leaf in (q.codes, q.scales))
    alone = dataclasses.replace(q, codes=codes, scales=scales)
    return jax.tree.map(lambda leaf: leaf[None], alone), jnp.zeros(1, jnp.int32)


def _scales_of(stack: QTensor) -> tuple[jax.Array, ...]:
    """Returns the arrays that a kernel makes scales from."""
    if stack.nested is None or stack.offset is None:
        return (stack.scales,)
    return stack.scales, stack.nested, stack.offset, jnp.asarray(dynamic_map())


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled form: everything about a product but its data and its number of tiles.

    Attributes:
      tile: a block's share.
      operand: the right operand of a step.
      dtype: of the left operand and of the result.
      steps: along the contraction.
      nested_block: scales per nested scale.
      splits: into how many parts the contraction is divided, each a block's (split-K).
    """

    tile: Tile
    operand: Operand
    dtype: Any
    steps: int
    nested_block: int
    splits: int = 1

    def __call__(
        self,
        left: jax.Array,
        layer: jax.Array,
        codes: jax.Array,
        codebook: jax.Array,
        scales: tuple[jax.Array, ...],
        outer: int,
    ) -> jax.Array:
        """left [M, C] @ the weight [C, outer]; M and outer are multiples of the tile's.

        Args:
          left: [M, C].
          layer: int32[1], the weight's place in its stack.
          codes, codebook: the stack's, [L, ...].
          scales: likewise those of the blocks and, with double quantization, nested, offset [L]
            and the dynamic map, which has no L.
          outer: output features.

        Returns:
          [splits, M, outer], parts of a sum in float32; one part is in dtype.
        """
        tile, pairs = self.tile, self.operand.scale_shape
        tiles = left.shape[0] // tile.m
        call = plgpu.kernel(
            functools.partial(self._block, len(scales), tiles),
            out_type=jax.ShapeDtypeStruct((self.splits * left.shape[0], outer), self.out_dtype),
            grid=(tiles, outer // tile.o, self.splits),
            grid_names=("m", "o", "s"),
            scratch_types=[
                plgpu.SMEM(fragments.TABLE, jnp.int32),
                plgpu.SMEM((2, *pairs), self.dtype if self.operand.transposed else jnp.int32),
                plgpu.SMEM(aside_shape(self.operand, len(scales)), jnp.int32),
            ],
        )
        y = call(left, layer, codes.reshape(-1, codes.shape[2]), codebook, *scales)
        return y.reshape(self.splits, *left.shape[:1], outer)

    @property
    def out_dtype(self) -> Any:
        return jnp.dtype(jnp.float32) if self.splits > 1 else self.dtype

    @property
    def left_tiling(self) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
        return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    @property
    def code_tiling(self) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
        width = self.operand.code_swizzle
        return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)

    @property
    def accumulator(self) -> plgpu.ShapeDtypeStruct:
        if self.operand.form == "wgmma":
            shape = (self.tile.o, self.tile.m)
            return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
        warps = self.operand.m_warps
        layout = plgpu.Layout.MMA_ACC(self.dtype, m_warps=warps)
        shape = (warps * self.tile.m, self.tile.o)
        return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    def _block(
        self, count: int, tiles: int, left: Any, layer: Any, codes: Any, codebook: Any, *rest: Any
    ) -> None:
        scales, (out, table, slots, aside) = rest[:count], rest[count:]
        tile, acc = self.tile, self.accumulator
        m, o, s = (lax.axis_index(name) for name in ("m", "o", "s"))
        first, steps = self._steps_of(s)
        layer = layer[0]
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
        finish(pipeline(left, codes), table, out, s * tiles + m, o)

    def _steps_of(self, split: jax.Array) -> tuple[Any, Any]:
        """The first step of a part of the contraction, and how many it has."""
        if self.splits == 1:
            return 0, self.steps
        each = -(-self.steps // self.splits)
        first = split * each
        if self.steps % self.splits == 0:
            return first, each
        return first, jnp.minimum(each, self.steps - first)


class DeviceCode(NamedTuple):
    """The parts of a block that are written for threads, as functions of references.

    Attributes:
      prepare: (codebook, table, slot, aside, scales, layer, o, first), fills the table of pairs
        and the scales of step `first`, and puts aside what those of the next step are made from.
      multiply: (left, codes, table, now, later, aside, scales, layer, o, i, total), adds the
        product of step i to `total` with the scales in `now`, and writes those of step i + 1 to
        `later`.
      finish: (total, table, out, m, o), writes tile (m, o) of `out`; the table is free.
    """

    prepare: Callable[..., None]
    multiply: Callable[..., jax.Array]
    finish: Callable[..., None]


def device_code(kernel: Kernel, count: int) -> DeviceCode:
    """Returns the device code of a kernel whose QTensor has `count` arrays of scales.

    A scale takes three loads, one after another, and the first comes from device memory. So that no
    step waits for them, they are made in three different steps: PREFETCH steps ahead its code is
    brought to the level 2 cache, two steps ahead to the block, and one step ahead it is decoded.
    """
    return DeviceCode(_prepare(kernel, count), _multiply(kernel, count), _finish(kernel))


def _prepare(kernel: Kernel, count: int) -> Callable[..., None]:
    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, (REF,) * count, SCALAR, SCALAR, SCALAR))
    def prepare(_, codebook, table, slot, aside, references, layer, o, first):
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


def _multiply(kernel: Kernel, count: int) -> Callable[..., jax.Array]:
    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(kernel.left_tiling),
            plgpu.RefType(kernel.code_tiling),
            *(REF, REF, REF, REF, (REF,) * count, SCALAR, SCALAR, SCALAR),
            kernel.accumulator.layout,
        ),
        return_type=kernel.accumulator,
    )
    def multiply(_, left, codes, table, now, later, aside, references, layer, o, i, total):
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
        # the next step reads these scales, and its copies may overwrite this step's tiles
        utils.warpgroup_barrier()
        return total

    return multiply


def _finish(kernel: Kernel) -> Callable[..., None]:
    @plgpu.inline_mgpu(arg_types=(kernel.accumulator.layout, REF, REF, SCALAR, SCALAR))
    def finish(_, total, scratch, out, m, o):
        element = utils.dtype_to_ir_type(kernel.out_dtype)
        tile = m.registers.item(), o.registers.item()
        results.store(kernel.operand, total, scratch, out, *tile, element)
        return ()

    return finish


def _scales(kernel: Kernel, references: Any, layer: Any) -> Scales:
    arrays = (*references, None, None, None)[:4]
    return Scales(kernel.operand, kernel.steps, layer, *arrays, kernel.nested_block)


def _spec(shape: tuple[int, int], index_map: Callable, transforms: Any) -> plgpu.BlockSpec:
    # In bounds by the padding; the pipelines of sm_80 take nothing else. An untiled block would
    # be copied without regard to the rows' stride there, and nothing would say so.
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
