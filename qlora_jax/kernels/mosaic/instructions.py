"""Functions that emit MLIR instructions of device code, one function per instruction.

A call emits the instruction at the current position of the device code. Each thread of a warpgroup
runs it. Integers have 32 bits.
"""

import math

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qlora_jax.kernels.mosaic.operand import LANES, WARPS, ThreadIndex

THREADS = WARPS * LANES


def thread_id() -> ir.Value:
    """Returns the running thread's number in its warpgroup."""
    return arith.remui(utils.thread_idx(), constant(THREADS))


def warp_id() -> ir.Value:
    """Returns the number of the running thread's warp."""
    return arith.divui(thread_id(), constant(LANES))


def lane_id() -> ir.Value:
    """Returns the running thread's number in its warp."""
    return arith.remui(utils.thread_idx(), constant(LANES))


def index_of(place: ThreadIndex) -> ir.Value:
    """Returns the value of a ThreadIndex for the running thread."""
    lane = lane_id()
    own = add(
        mul(arith.divui(lane, constant(4)), place.g), mul(arith.remui(lane, constant(4)), place.t)
    )
    step = place.warps[1]
    if place.warps == tuple(step * w for w in range(WARPS)):
        return add(own, mul(warp_id(), step))
    warp, offset = warp_id(), constant(place.warps[0])
    for w in range(1, WARPS):
        here = arith.cmpi(arith.CmpIPredicate.eq, warp, constant(w))
        offset = arith.select(here, constant(place.warps[w]), offset)
    return add(own, offset)


def address(pointer: ir.Value, index: ir.Value | int, element: ir.Type) -> ir.Value:
    """Returns a pointer to an element of an array."""
    return utils.getelementptr(pointer, [index], element)


def part_of(stack: ir.Value, layer: ir.Value, element: ir.Type) -> ir.Value:
    """Returns a pointer to one layer of an array whose first axis is the layer."""
    long = integer(64)  # a stack may have more than 2^31 elements
    size = math.prod(ir.MemRefType(stack.type).shape[1:])
    start = arith.muli(arith.extui(long, layer), utils.c(size, long))
    return utils.getelementptr(utils.memref_ptr(stack), [start], element)


def load_f32(pointer: ir.Value, index: ir.Value | int) -> ir.Value:
    """Loads one float32 of an array in memory."""
    return llvm.load(f32(), address(pointer, index, f32()))


def extract(register: ir.Value, position: int) -> ir.Value:
    """Returns one element of a register that holds several."""
    static = ir.DenseI64ArrayAttr.get([position])
    return vector.extract(register, dynamic_position=[], static_position=static)


def permute(a: ir.Value, b: ir.Value, selector: int) -> ir.Value:
    """Returns four of the eight bytes of {b, a}, one for each hexadecimal digit of `selector`."""
    asm = f"prmt.b32 $0, $1, $2, {selector:#x};"
    return llvm.inline_asm(i32(), [a, b], asm, "=r,r,r", has_side_effects=False)


def prefetch(pointer: ir.Value) -> None:
    """Prefetches a line of device memory into the level 2 cache."""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [pointer],
        "prefetch.global.L2 [$0];",
        "l",
        has_side_effects=True,
    )


def add(a: ir.Value, b: ir.Value | int) -> ir.Value:
    """Returns a + b."""
    return arith.addi(a, constant(b) if isinstance(b, int) else b)


def mul(a: ir.Value | int, b: int) -> ir.Value:
    """Returns a * b."""
    return arith.muli(constant(a) if isinstance(a, int) else a, constant(b))


def constant(value: int) -> ir.Value:
    """Returns an integer constant of the compiled kernel."""
    return utils.c(value, i32())


def as_index(value: ir.Value) -> ir.Value:
    """Returns an integer converted to MLIR's index type, for indices of a reference."""
    return arith.index_cast(ir.IndexType.get(), value)


def integer(bits: int) -> ir.Type:
    """Returns the type of integers with this number of bits."""
    return ir.IntegerType.get_signless(bits)


def i32() -> ir.Type:
    """Returns the type of 32-bit integers."""
    return integer(32)


def f32() -> ir.Type:
    """Returns the type of float32."""
    return ir.F32Type.get()
