"""Device code of the Mosaic GPU kernels: moves block scales from device memory to shared memory.

With double quantization scale = map[code] * nested + offset. README.md says in which steps this is
computed. The scales of a tile are divided among the threads of the warpgroup: thread i has the
scales i, i + 128, ... If a tile has fewer than 128 scales, some are computed twice, with the same
value.
"""

import dataclasses
import math

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qlora_jax.kernels.mosaic.instructions import (
    THREADS,
    add,
    address,
    constant,
    f32,
    i32,
    integer,
    load_f32,
    mul,
    part_of,
    prefetch,
    thread_id,
)
from qlora_jax.kernels.mosaic.operand import Operand


@dataclasses.dataclass(frozen=True)
class Scales:
    """References to the block scales of a stack in device memory, for one kernel.

    Attributes:
      operand: quantized operand of one step.
      steps: number of steps along the contraction; beyond them, the last step's scales are loaded.
      layer: index of the matrix in its stack.
      blocks: stored scales, float32 or uint8[L, nb, N].
      nested: scales of the scales, float32[L, ...]; None without double quantization.
      offset: number added to every scale, float32[L]; None without double quantization.
      dynamic_map: values of the 8-bit codes, float32[256]; None without double quantization.
      nested_block: scales per nested scale.
    """

    operand: Operand
    steps: int
    layer: ir.Value
    blocks: ir.Value
    nested: ir.Value | None
    offset: ir.Value | None
    dynamic_map: ir.Value | None
    nested_block: int

    def prefetch(self, o: ir.Value, step: ir.Value, ahead: int) -> None:
        """Prefetches the memory that `fetch` reads into the level 2 cache."""
        for pointers in self._pointers(o, step, ahead):
            for pointer in pointers:
                prefetch(pointer)

    def fetch(self, o: ir.Value, step: ir.Value, ahead: int) -> list[ir.Value]:
        """Loads the stored form of this thread's scales.

        Args:
          o: index of the output tile.
          step: index of the current step.
          ahead: number of steps after `step` whose scales are loaded.

        Returns:
          32-bit words: for each scale its float32; with double quantization its code and its nested
          scale.
        """
        found = []
        for block, *nested in self._pointers(o, step, ahead):
            if nested:
                found.append(arith.extui(i32(), llvm.load(integer(8), block)))
                found.append(llvm.load(i32(), nested[0]))
            else:
                found.append(llvm.load(i32(), block))
        return found

    def put_aside(self, fetched: list[ir.Value], aside: ir.Value) -> None:
        """Writes the words of `fetch` to this thread's own shared memory, without a barrier."""
        for i, word in enumerate(fetched):
            llvm.store(word, _own(aside, i))

    def take_back(self, aside: ir.Value) -> list[ir.Value]:
        """Reads the words that this thread wrote with `put_aside`."""
        words = 1 if self.nested is None else 2
        count = len(_entries(self.operand)) * words
        return [llvm.load(i32(), _own(aside, i)) for i in range(count)]

    def values(self, fetched: list[ir.Value]) -> list[ir.Value]:
        """Computes the scales, float32, from the words of `fetch`."""
        if self.nested is None:
            return [utils.bitcast(word, f32()) for word in fetched]
        found = []
        levels, offset = utils.memref_ptr(self.dynamic_map), part_of(self.offset, self.layer, f32())
        for code, nested in zip(fetched[::2], fetched[1::2]):
            product = arith.mulf(load_f32(levels, code), utils.bitcast(nested, f32()))
            found.append(arith.addf(product, load_f32(offset, 0)))
        return found

    def store(self, values: list[ir.Value], slot: ir.Value, dtype: ir.Type) -> None:
        """Rounds this thread's scales to `dtype` and writes them to shared memory; no barrier."""
        base = utils.memref_ptr(slot)
        for entry, value in zip(_entries(self.operand), values):
            rounded = arith.truncf(dtype, value)
            if self.operand.transposed:
                llvm.store(rounded, address(base, entry, dtype))
            else:
                pair = vector.broadcast(ir.VectorType.get((2,), dtype), rounded)
                llvm.store(utils.bitcast(pair, i32()), address(base, entry, i32()))

    def _pointers(self, o: ir.Value, step: ir.Value, ahead: int) -> list[list[ir.Value]]:
        """Returns pointers to this thread's scales; with double quantization also to nested."""
        operand, step = self.operand, arith.minui(add(step, ahead), constant(self.steps - 1))
        block, column = (o, step) if operand.transposed else (step, o)
        k, n = (operand.o, operand.c) if operand.transposed else (operand.c, operand.o)
        block = arith.divui(mul(block, k), constant(operand.block_size))
        column = mul(column, n)
        _, nb, columns = ir.MemRefType(self.blocks.type).shape
        kind = f32() if self.nested is None else integer(8)
        blocks = part_of(self.blocks, self.layer, kind)
        width = operand.scale_shape[1]
        found = []
        for entry in _entries(operand):
            b = add(block, arith.divui(entry, constant(width)))
            b = arith.minui(b, constant(nb - 1))  # rows beyond K
            c = add(column, arith.remui(entry, constant(width)))
            place = add(mul(b, columns), c)
            pointers = [address(blocks, place, kind)]
            if self.nested is not None:
                index = arith.divui(add(mul(c, nb), b), constant(self.nested_block))
                last = ir.MemRefType(self.nested.type).shape[1] - 1
                index = arith.minui(index, constant(last))  # padded columns
                pointers.append(address(part_of(self.nested, self.layer, i32()), index, i32()))
            found.append(pointers)
        return found


def aside_shape(operand: Operand, count: int) -> tuple[int, int]:
    """Returns the shape of the memory for `put_aside`, in 32-bit words.

    Args:
      operand: quantized operand of one step.
      count: number of arrays that hold the scales; more than 1 means double quantization.
    """
    each = max(1, math.prod(operand.scale_shape) // THREADS)
    return each * (1 if count == 1 else 2), THREADS


def _own(aside: ir.Value, i: int) -> ir.Value:
    return address(utils.memref_ptr(aside), add(thread_id(), i * THREADS), i32())


def _entries(operand: Operand) -> list[ir.Value]:
    """Returns the running thread's indices into a flattened tile of scales."""
    count, thread = math.prod(operand.scale_shape), thread_id()
    if count < THREADS:
        return [arith.remui(thread, constant(count))]
    return [add(thread, i * THREADS) for i in range(count // THREADS)]
