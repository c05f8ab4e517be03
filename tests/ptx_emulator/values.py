"""PTX arithmetic on numpy arrays, after NVIDIA's PTX ISA manual.

A register is an unsigned array over threads. `decode` converts its bits to values of a type:
integers, or float64 for every floating-point type. In float64, one operation on narrower operands
is exact, or its rounding does not change the final result. `encode` rounds once to the type.
"""

import functools
from collections.abc import Callable

import numpy as np

from ptx_emulator.text import Unsupported

Array = np.ndarray

INTEGERS = {
    f"{kind}{bits}": np.dtype(f"{'int' if kind == 's' else 'uint'}{bits}")
    for kind in "bus"
    for bits in (8, 16, 32, 64)
}
FLOATS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "s16x2": "s16", "u16x2": "u16"}
SMALLEST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def width(type: str) -> int:
    """Returns the bits of a type; 1 for a predicate."""
    if type == "pred":
        return 1
    if type in FLOATS:
        return FLOATS[type]
    if type in PAIRS:
        return 32
    if type in INTEGERS:
        return INTEGERS[type].itemsize * 8
    raise Unsupported(f"type {type}")


def decode(bits: Array, type: str) -> Array:
    """Returns the values of unsigned bits [...]; pairs become [..., 2], low half first."""
    if type == "pred":
        return bits
    if type in INTEGERS:
        return bits.view(INTEGERS[type])
    if type in PAIRS:
        halves = np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)
        return decode(halves, PAIRS[type])
    if type == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(f"f{FLOATS[type] // 8}").astype(np.float64)


def encode(value: Array, type: str, mode: str = "rn") -> Array:
    """Returns the bits of values, the inverse of `decode`.

    `mode` is the rounding: "rn" to nearest even, "rz" to zero, "rm" down or "rp" up.
    """
    if type == "pred":
        return value.astype(bool)
    if type in INTEGERS:
        unsigned = UNSIGNED[INTEGERS[type].itemsize * 8]
        return np.ascontiguousarray(value.astype(INTEGERS[type], copy=False)).view(unsigned)
    if type in PAIRS:
        halves = encode(value, PAIRS[type], mode)
        return np.ascontiguousarray(halves).view(np.uint32)[..., 0]
    bits = _nearest(np.asarray(value, np.float64), type)
    if mode in ("rn", "rna"):
        return bits
    rounded = decode(bits, type)
    wrong = {
        "rz": np.abs(rounded) > np.abs(value),
        "rm": rounded > value,
        "rp": rounded < value,
    }[mode]
    inward = {"rz": True, "rm": rounded > 0, "rp": rounded < 0}[mode]
    step = np.where(inward, bits - bits.dtype.type(1), bits + bits.dtype.type(1))
    return np.where(wrong, step, bits)


def _nearest(value: Array, type: str) -> Array:
    if type == "bf16":
        # The first rounding, to float32, is to odd, so that two roundings equal one.
        single = value.astype(np.float32)
        bits, back = single.view(np.uint32), single.astype(np.float64)
        bits = np.where(np.abs(back) > np.abs(value), bits - np.uint32(1), bits)
        bits = bits | (back != value).astype(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)
    return value.astype(f"f{FLOATS[type] // 8}").view(UNSIGNED[FLOATS[type]])


def convert(value: Array, source: str, target: str, mods: tuple[str, ...]) -> Array:
    """Returns the bits in type `target` of decoded values of type `source` (`cvt`)."""
    mode = next((m for m in mods if m in ("rn", "rna", "rz", "rm", "rp")), "rn")
    whole = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    if source in FLOATS:
        if "ftz" in mods:
            value = flush(value, source)
        rounders = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        if target in INTEGERS:
            info = np.iinfo(INTEGERS[target])
            value = np.nan_to_num(rounders[whole or "rzi"](value), nan=0.0)
            inside = np.clip(value, float(info.min), float(info.max))
            # float(2**63 - 1) rounds to 2**63, which int64 does not hold.
            exact = np.where(value >= float(info.max), info.max, inside.astype(INTEGERS[target]))
            return encode(exact, target)
        if whole:
            value = rounders[whole](value)
        if "relu" in mods:
            value = np.where(value < 0, 0.0, value)
        if "sat" in mods:
            value = saturate(value)
        if "ftz" in mods:
            value = flush(value, target)
        return encode(value, target, mode)
    if target in INTEGERS:
        info = np.iinfo(INTEGERS[target])
        if "sat" in mods:
            value = np.array([min(max(int(v), info.min), info.max) for v in value.flat])
            return encode(value.astype(INTEGERS[target]), target)
        return encode(value.astype(INTEGERS[target]), target)
    if value.dtype.itemsize == 8 and target != "f64" and np.any(np.abs(value) > 2**53):
        raise Unsupported(f"cvt of a large 64-bit integer to {target}")
    return encode(value.astype(np.float64), target, mode)


def flush(value: Array, type: str) -> Array:
    """Replaces the type's subnormal numbers by zeros of the same sign."""
    small = np.abs(value) < SMALLEST_NORMAL.get(PAIRS.get(type, type), 0.0)
    return np.where(small, np.copysign(0.0, value), value)


def saturate(value: Array) -> Array:
    return np.where(np.isnan(value), 0.0, np.clip(value, 0.0, 1.0))


def fused(a: Array, b: Array, c: Array) -> Array:
    """Returns a·b + c rounded to odd; a, b and c are float64 of at most 24 significant bits.

    A second rounding, to 24 bits or fewer, then gives the rounded exact sum.
    """
    product = a * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.uint64)
    change = np.isfinite(total) & np.isfinite(error) & (error != 0) & (bits & np.uint64(1) == 0)
    outward = (error > 0) == (total > 0)
    odd = np.where(outward, bits + np.uint64(1), bits - np.uint64(1))
    return np.where(change, odd, bits).view(np.float64)


def _extreme(chosen: Callable[[Array, Array], Array], low: bool) -> Callable[..., Array]:
    def extreme(type: str, mods: tuple[str, ...], a: Array, b: Array) -> Array:
        if not _is_float(type):
            return chosen(a, b)
        ignore = {np.minimum: np.fmin, np.maximum: np.fmax}[chosen]
        either = chosen(a, b) if "NaN" in mods else ignore(a, b)
        zero = np.where(np.signbit(a) == low, a, b)
        return np.where((a == 0) & (b == 0), zero, either)

    return extreme


def _is_float(type: str) -> bool:
    return PAIRS.get(type, type) in FLOATS


def _quotient(type: str, mods: tuple[str, ...], a: Array, b: Array) -> Array:
    if _is_float(type):
        return a / b
    if not np.issubdtype(INTEGERS[type], np.signedinteger):
        return np.where(b == 0, ~b, a // np.where(b == 0, 1, b).astype(b.dtype))
    whole = a // np.where(b == 0, 1, b).astype(b.dtype)
    # PTX rounds towards zero, numpy rounds down.
    return whole + ((whole * b != a) & ((a < 0) != (b < 0)))


def _remainder(type: str, mods: tuple[str, ...], a: Array, b: Array) -> Array:
    return (a - _quotient(type, mods, a, b) * b).astype(INTEGERS[type])


def wide(type: str) -> str:
    """Returns the type of a product with all its bits: twice as wide."""
    return f"{type[0]}{width(type) * 2}"


def _product(type: str, mods: tuple[str, ...], a: Array, b: Array) -> Array:
    if _is_float(type):
        return a * b
    if "wide" in mods:
        to = INTEGERS[wide(type)]
        return a.astype(to) * b.astype(to)
    if "hi" in mods:
        bits, to = width(type), INTEGERS[type]
        if bits == 64:
            a, b = np.broadcast_arrays(a, b)
            high = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a.flat, b.flat)]
            return np.array(high, np.uint64).view(to)
        long = np.int64 if type[0] == "s" else np.uint64
        return ((a.astype(long) * b.astype(long)) >> long(bits)).astype(to)
    return a * b


def _multiply_add(type: str, mods: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    return _product(type, mods, a, b) + c


def _fused(type: str, mods: tuple[str, ...], a: Array, b: Array, c: Array) -> Array:
    if type == "f64":
        raise Unsupported("fma.f64")
    value = fused(*np.broadcast_arrays(a, b, c))
    return np.where(value < 0, 0.0, value) if "relu" in mods else value


def _left(type: str, mods: tuple[str, ...], a: Array, count: Array) -> Array:
    amount = np.minimum(count, width(type) - 1).astype(a.dtype)
    return np.where(count >= width(type), 0, a << amount).astype(a.dtype)


def _right(type: str, mods: tuple[str, ...], a: Array, count: Array) -> Array:
    amount = np.minimum(count, width(type) - 1).astype(a.dtype)
    lost = 0 if type[0] != "s" else a >> a.dtype.type(width(type) - 1)
    return np.where(count >= width(type), lost, a >> amount).astype(a.dtype)


def _not(type: str, mods: tuple[str, ...], a: Array) -> Array:
    return ~a


def _count_bits(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


def _leading(type: str, mods: tuple[str, ...], a: Array) -> Array:
    return np.array([width(type) - int(v).bit_length() for v in a.flat], np.uint32)


def _reverse(type: str, mods: tuple[str, ...], a: Array) -> Array:
    bits = width(type)
    return np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in a.flat], a.dtype)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Returns bit 4a + 2b + c of `table` for each bit of three uint32 (`lop3`)."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Selects four of the eight bytes of {b, a}; a nibble's high bit replicates the sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(a.shape, np.uint64)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (pool >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), 255, 0).astype(np.uint64)
        out |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def extract(type: str, a: Array, position: Array, length: Array) -> Array:
    """Extracts a bit field from a (`bfe`)."""
    bits = width(type)
    out = []
    for value, at, count in zip(*(x.flat for x in np.broadcast_arrays(a, position, length))):
        at, count = int(at) & 255, int(count) & 255
        field = (int(value) & (2**bits - 1)) >> at & (2**count - 1)
        top = min(at + count - 1, bits - 1)
        if type[0] == "s" and count and int(value) >> top & 1:
            field |= ((2**bits - 1) << max(min(count, bits - at), 0)) & (2**bits - 1)
        out.append(field & (2**bits - 1))
    return np.array(out, UNSIGNED[bits])


def insert(type: str, a: Array, b: Array, position: Array, length: Array) -> Array:
    """Inserts the low bits of a into b (`bfi`)."""
    bits = width(type)
    out = []
    for x, y, at, count in zip(*(v.flat for v in np.broadcast_arrays(a, b, position, length))):
        at, count = int(at) & 255, int(count) & 255
        mask = ((2**count - 1) << at) & (2**bits - 1)
        out.append(int(y) & ~mask | int(x) << at & mask)
    return np.array(out, UNSIGNED[bits])


def funnel(low: Array, high: Array, count: Array, mods: tuple[str, ...]) -> Array:
    """Shifts the 64 bits of {high, low}; returns 32 bits of the result (`shf`)."""
    low, high, count = np.broadcast_arrays(low, high, count)
    amount = np.minimum(count, 32) if "clamp" in mods else count & np.uint32(31)
    pool = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    amount = amount.astype(np.uint64)
    if "r" in mods:
        return (pool >> amount).astype(np.uint32)
    return ((pool << amount) >> np.uint64(32)).astype(np.uint32)


Operation = Callable[..., Array]

SAME: dict[str, tuple[int, Operation]] = {
    "add": (2, lambda t, m, a, b: a + b),
    "sub": (2, lambda t, m, a, b: a - b),
    "mul": (2, _product),
    "mad": (3, lambda t, m, *x: _fused(t, m, *x) if _is_float(t) else _multiply_add(t, m, *x)),
    "fma": (3, _fused),
    "div": (2, _quotient),
    "rem": (2, _remainder),
    "min": (2, _extreme(np.minimum, low=True)),
    "max": (2, _extreme(np.maximum, low=False)),
    "abs": (1, lambda t, m, a: np.abs(a)),
    "neg": (1, lambda t, m, a: -a),
    "and": (2, lambda t, m, a, b: a & b),
    "or": (2, lambda t, m, a, b: a | b),
    "xor": (2, lambda t, m, a, b: a ^ b),
    "not": (1, _not),
    "cnot": (1, lambda t, m, a: (a == 0).astype(a.dtype)),
    "brev": (1, _reverse),
    "rcp": (1, lambda t, m, a: 1 / a),
    "sqrt": (1, lambda t, m, a: np.sqrt(a)),
    "rsqrt": (1, lambda t, m, a: 1 / np.sqrt(a)),
    "ex2": (1, lambda t, m, a: np.exp2(a)),
    "lg2": (1, lambda t, m, a: np.log2(a)),
    "sin": (1, lambda t, m, a: np.sin(a)),
    "cos": (1, lambda t, m, a: np.cos(a)),
    "tanh": (1, lambda t, m, a: np.tanh(a)),
    "copysign": (2, lambda t, m, a, b: np.copysign(b, a)),
}
"""Number of operands and function of the operations on operands of the instruction's type."""

COUNTS: dict[str, Operation] = {
    "popc": lambda t, m, a: _count_bits(a),
    "clz": _leading,
}
SHIFTS: dict[str, Operation] = {"shl": _left, "shr": _right}

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a != b) & (a == a) & (b == b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}

LANES = np.arange(32)


@functools.cache
def fragment(name: str, depth: int) -> tuple[Array, Array]:
    """Returns row and column, [32 lanes, elements], of a lane's part of A, B or C of m16n8k{depth}.

    PTX ISA, "Matrix Fragments for mma.m16n8k8" and "for mma.m16n8k16": groupID = lane / 4 and
    threadID_in_group = lane % 4.
    """
    i = np.arange({"a": depth // 2, "b": depth // 4, "c": 4}[name])
    group, pair = LANES[:, None] // 4, LANES[:, None] % 4 * 2 + i % 2
    return {
        "a": (group + 8 * (i // 2 % 2), pair + 8 * (i // 4)),
        "b": (pair + 8 * (i // 2), group + 0 * i),
        "c": (group + 8 * (i // 2), pair),
    }[name]


def mma(a: Array, b: Array, c: Array, type: str, depth: int) -> Array:
    """Returns the registers of D = A·B + C, uint32 [warps, 32, 4]; the sum is rounded once.

    Args:
      a: registers of A, uint32 [warps, 32, depth/4].
      b: registers of B, uint32 [warps, 32, depth/8].
      c: registers of C, float32 bits, uint32 [warps, 32, 4].
      type: type of A and B, "f16" or "bf16".
      depth: length of the contraction, 8 or 16.
    """
    warps = len(a)

    def matrix(registers: Array, name: str, type: str, shape: tuple[int, int]) -> Array:
        values = decode(registers, type).reshape(warps, 32, -1)
        rows, columns = fragment(name, depth)
        out = np.full((warps, *shape), np.nan)
        out[:, rows, columns] = values
        return out

    left = matrix(a, "a", f"{type}x2", (16, depth))
    right = matrix(b, "b", f"{type}x2", (depth, 8))
    total = left @ right + matrix(c, "c", "f32", (16, 8))
    rows, columns = fragment("c", depth)
    return encode(total[:, rows, columns], "f32")


def spread(rows: Array, transposed: bool) -> Array:
    """Distributes rows to lanes, as `ldmatrix`: uint16 [..., 8 rows, 8] to uint32 [..., 32].

    Lane l holds elements 2(l % 4) and 2(l % 4) + 1 of row l / 4, or of column l / 4.
    """
    matrix = np.swapaxes(rows, -1, -2) if transposed else rows
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(*rows.shape[:-2], 32)


def gather(registers: Array, transposed: bool) -> Array:
    """Collects rows from lanes, the inverse of `spread`, for `stmatrix`."""
    matrix = np.ascontiguousarray(registers).view(np.uint16)
    matrix = matrix.reshape(*registers.shape[:-1], 8, 8)
    return np.ascontiguousarray(np.swapaxes(matrix, -1, -2)) if transposed else matrix


def shuffle(mode: str, operand: Array, control: Array) -> tuple[Array, Array]:
    """Returns source lane and predicate of `shfl.sync` from its operands b and c, [..., 32]."""
    b, clamp = operand.astype(np.int64) & 31, control.astype(np.int64)
    segment, clamp = clamp >> 8 & 31, clamp & 31
    first, last = LANES & segment, (LANES & segment) | (clamp & ~segment & 31)
    source = {
        "up": LANES - b,
        "down": LANES + b,
        "bfly": LANES ^ b,
        "idx": first | (b & ~segment & 31),
    }[mode]
    inside = source >= last if mode == "up" else source <= last
    return np.where(inside, source, LANES), inside


ATOMIC: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "exch": lambda a, b: b,
}
