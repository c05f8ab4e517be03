"""An emulator of NVIDIA's PTX for sm_80 kernels: runs compiled kernels where there is no GPU.

It is slow and strict. Semantics are the PTX ISA manual's; a block's threads run together as numpy
arrays, blocks one after the other. It raises where a GPU would go wrong in silence: accesses out
of bounds or misaligned, reads of shared memory before a write or a barrier, barriers that not all
threads reach. `cp.async` brings its bytes only when waited for. What it cannot see: races in global
memory, timing, and the tensor cores' own rounding (sums here are exact, then rounded once).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ptx_memory import Clocks, Fault, Memory, Shared
from ptx_text import (
    Address,
    Group,
    Instruction,
    Not,
    Number,
    Operand,
    Program,
    PtxError,
    Register,
    Symbol,
    Unsupported,
    Variable,
    parse,
)
from ptx_values import (
    COMPARISONS,
    COUNTS,
    FLOATS,
    INTEGERS,
    PAIRS,
    SAME,
    SHIFTS,
    UNSIGNED,
    convert,
    decode,
    encode,
    extract,
    flush,
    funnel,
    gather,
    insert,
    lop3,
    mma,
    prmt,
    saturate,
    shuffle,
    spread,
    wide,
    width,
)

Array = np.ndarray

GLOBAL = 0x7_0000_0000
SHARED = 1024
SHARED_WINDOW = 0x10_0000_0000
LOCAL_WINDOW = 0x20_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0, "param": 0}
WINDOW_SIZE = 1 << 32


class Deadlock(PtxError):
    """Threads that wait for others that will not come."""


def emulate(
    ptx: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    shared: int = 0,
    entry: str | None = None,
    limit: int = 10_000_000,
) -> None:
    """Runs a kernel.

    Args:
      ptx: a module's text.
      grid: blocks along x, y and z; fewer mean 1.
      block: threads along x, y and z, a multiple of 32 in all.
      arguments: the entry's, in order: a contiguous array for a pointer, which the kernel changes
        in place, or a numpy scalar.
      shared: bytes of dynamic shared memory.
      entry: the kernel's name, where the module has several.
      limit: instructions that one block may take.

    Raises:
      Unsupported: an instruction that the emulator does not know.
      Fault, Race, Deadlock: the kernel is wrong; the message has the instruction.
    """
    program = parse(ptx, entry)
    code = [_Step(i, _form(i, program)) for i in program.instructions]
    if len(arguments) != len(program.parameters):
        raise PtxError(f"{program.name} takes {len(program.parameters)} arguments")
    buffers = [a for a in arguments if isinstance(a, np.ndarray) and a.ndim]
    module = [v for v in program.variables if v.space in ("global", "const")]
    device = Memory(GLOBAL, [b.nbytes for b in buffers] + [v.size or 0 for v in module])
    spans = [(device.offsets[i], b.nbytes) for i, b in enumerate(buffers)]
    for buffer, (at, size) in zip(buffers, spans):
        device.data[at : at + size] = np.ascontiguousarray(buffer).reshape(-1).view(np.uint8)
    addresses = iter(range(len(buffers)))
    values = {
        v.name: np.frombuffer(
            np.uint64(device.address(next(addresses))).tobytes()
            if isinstance(a, np.ndarray) and a.ndim
            else a.tobytes(),
            np.uint8,
        )
        for v, a in zip(program.parameters, arguments)
    }
    symbols = {v.name: device.address(len(buffers) + i) for i, v in enumerate(module)}
    for i, v in enumerate(module):
        initial = np.array(v.values or [0] * ((v.size or 0) // v.element), np.int64)
        raw = initial.astype(UNSIGNED[v.element * 8]).view(np.uint8)
        at = device.offsets[len(buffers) + i]
        device.data[at : at + len(raw)] = raw
    sizes = tuple(grid) + (1,) * (3 - len(grid)), tuple(block) + (1,) * (3 - len(block))
    with np.errstate(all="ignore"):
        for z, y, x in itertools.product(*map(range, reversed(sizes[0]))):
            _Block(program, code, device, symbols, values, sizes, (x, y, z), shared).run(limit)
    for buffer, (at, size) in zip(buffers, spans):
        buffer[...] = device.data[at : at + size].view(buffer.dtype).reshape(buffer.shape)


class _Local:
    """Each thread's own memory."""

    def __init__(self, threads: int, size: int) -> None:
        self.data = np.full((threads, size), 0xFF, np.uint8)

    def _columns(self, addresses: Array, size: int) -> Array:
        at = addresses.astype(np.int64)[:, None] + np.arange(size)
        if at.size and (at.min() < 0 or at.max() >= self.data.shape[1] or (at[:, 0] % size).any()):
            raise Fault(f"{size} bytes of local memory: out of bounds or misaligned")
        return at

    def read(self, addresses: Array, size: int, threads: Array) -> Array:
        return self.data[threads[:, None], self._columns(addresses, size)]

    def write(self, addresses: Array, values: Array, threads: Array) -> None:
        self.data[threads[:, None], self._columns(addresses, values.shape[1])] = values


@dataclasses.dataclass
class _Copy:
    """A cp.async under way: arrays over all threads, `mask` those still to land."""

    mask: Array
    group: Array
    addresses: Array
    values: Array


@dataclasses.dataclass
class _Barrier:
    expected: int
    arrived: Array
    waiting: dict[int, Array]
    known: Array


class _Block:
    """One block: registers are unsigned arrays over its threads."""

    def __init__(
        self,
        program: Program,
        code: "list[_Step]",
        device: Memory,
        symbols: dict[str, int],
        values: dict[str, Array],
        sizes: tuple[tuple[int, ...], tuple[int, ...]],
        place: tuple[int, int, int],
        shared: int,
    ) -> None:
        grid, block = sizes
        count = int(np.prod(block))
        if count % 32:
            raise Unsupported(f"a block of {count} threads")
        self.program, self.code, self.device, self.place = program, code, device, place
        self.count, self.warps = count, count // 32
        self.threads = np.arange(count)
        self.alive = np.ones(count, bool)
        self.clocks = Clocks(self.warps)
        self.barriers: dict[int, _Barrier] = {}
        self.copies: list[_Copy] = []
        self.groups = np.zeros(count, np.int64)
        static, local, self.symbols = 0, 0, dict(symbols)
        for v in program.variables:
            if v.space == "shared" and v.size is not None:
                static = -(-static // v.align) * v.align
                self.symbols[v.name] = SHARED + static
                static += v.size
            elif v.space == "local":
                local = -(-local // v.align) * v.align
                self.symbols[v.name] = local
                local += v.size or 0
        static = -(-static // 1024) * 1024
        self.symbols |= {v.name: SHARED + static for v in _dynamic(program)}
        self.shared = Shared(SHARED, static + shared, self.clocks)
        self.local = _Local(count, local)
        self.parameters = {n: np.broadcast_to(v, (count, len(v))) for n, v in values.items()}
        self.parameters |= {
            v.name: np.zeros((count, v.size or 0), np.uint8)
            for v in program.variables
            if v.space == "param"
        }
        self.registers: dict[str, Array] = _special(self.threads, grid, block, place)

    def run(self, limit: int) -> None:
        at = {0: self.alive.copy()}
        for _ in range(limit):
            if not at:
                break
            pc, mask = self._next(at)
            at.update({pc: rest} if (rest := at.pop(pc) & ~mask).any() else {})
            try:
                for target, threads in self.code[pc].run(self, pc, mask):
                    if threads.any():
                        at[target] = at[target] | threads if target in at else threads
            except PtxError as error:
                text = self.code[pc].instruction.text
                raise type(error)(f"{error} [block {self.place}: {text}]") from None
        else:
            raise Deadlock(f"block {self.place} takes more than {limit} instructions")
        if self.barriers:
            raise Deadlock(
                f"block {self.place} ends with threads at barriers {sorted(self.barriers)}"
            )

    def _next(self, at: dict[int, Array]) -> tuple[int, Array]:
        for pc in sorted(at):
            mask = at[pc]
            if (needed := self.code[pc].needed) is not None:
                mask = mask & needed(self, mask)
                if not mask.any():
                    continue
            return pc, mask
        text = " / ".join(self.code[pc].instruction.text for pc in sorted(at))
        raise Deadlock(f"block {self.place}: warps apart at {text}")

    def whole_warps(self, mask: Array) -> Array:
        """Threads whose warp's living threads are all in mask."""
        gone = (~mask & self.alive).reshape(-1, 32).any(-1)
        return np.repeat(~gone, 32)

    def write(self, name: str, bits: Array, mask: Array) -> None:
        if mask.all():
            full = bits.shape == (self.count,)
            self.registers[name] = bits if full else np.broadcast_to(bits, (self.count,)).copy()
        else:
            before = self.registers.get(name)
            if before is None:
                before = np.full(self.count, -1).astype(bits.dtype)
            self.registers[name] = np.where(mask, bits, before)

    def _places(self, space: str, addresses: Array) -> list[tuple[Any, Array, Array]]:
        """Memories, the positions in `addresses` that go to each, and the addresses there."""
        memories = {"shared": self.shared, "local": self.local}
        if space in ("global", "const"):
            return [(self.device, np.arange(len(addresses)), addresses)]
        if space in memories:
            return [(memories[space], np.arange(len(addresses)), addresses)]
        parts = []
        rest = np.ones(len(addresses), bool)
        for name, memory in memories.items():
            offset = addresses.astype(np.int64) - WINDOWS[name]
            inside = (offset >= 0) & (offset < WINDOW_SIZE)
            rest &= ~inside
            if inside.any():
                parts.append((memory, np.flatnonzero(inside), offset[inside]))
        if rest.any():
            parts.append((self.device, np.flatnonzero(rest), addresses[rest]))
        return parts

    def read(self, space: str, addresses: Array, size: int, threads: Array) -> Array:
        """uint8 [threads, size]."""
        out = np.empty((len(threads), size), np.uint8)
        for memory, part, at in self._places(space, addresses):
            out[part] = memory.read(at, size, threads[part])
        return out

    def store(self, space: str, addresses: Array, values: Array, threads: Array) -> None:
        for memory, part, at in self._places(space, addresses):
            memory.write(at, values[part], threads[part])

    def land(self, mask: Array, pending: int | None) -> None:
        """Completes copies of the threads in mask, all but their last `pending` groups.

        None: those of no group too.
        """
        kept = []
        for copy in self.copies:
            ready = copy.mask & mask
            if pending is not None:
                ready &= copy.group < self.groups - pending
            if ready.any():
                self.shared.land(copy.addresses[ready], copy.values[ready], self.threads[ready])
                copy.mask = copy.mask & ~ready
            if copy.mask.any():
                kept.append(copy)
        self.copies = kept

    def arrive(
        self, barrier: int, expected: int | None, after: int, mask: Array, waits: bool
    ) -> list[tuple[int, Array]]:
        """Threads arrive at a barrier; where the released ones go on."""
        expected = expected or self.count
        if expected % 32 or expected > self.count:
            raise Fault(f"barrier {barrier} for {expected} of {self.count} threads")
        at = self.barriers.setdefault(
            barrier,
            _Barrier(expected, np.zeros(self.count, bool), {}, np.zeros(self.warps, np.int64)),
        )
        if at.expected != expected or (at.arrived & mask).any():
            raise Deadlock(f"barrier {barrier} is entered in two ways at once")
        at.arrived = at.arrived | mask
        for warp in np.unique(self.threads[mask] // 32):
            at.known = np.maximum(at.known, self.clocks.leave(warp))
        if waits:
            at.waiting[after] = at.waiting.get(after, False) | mask
        if at.arrived.sum() > expected:
            raise Deadlock(f"barrier {barrier}: {at.arrived.sum()} threads came, not {expected}")
        released = [] if waits else [(after, mask)]
        if at.arrived.sum() == expected:
            del self.barriers[barrier]
            for target, threads in at.waiting.items():
                for warp in np.unique(self.threads[threads] // 32):
                    self.clocks.join(warp, at.known)
                released.append((target, threads))
        return released


def _dynamic(program: Program) -> list[Variable]:
    return [v for v in program.variables if v.space == "shared" and v.size is None]


def _special(
    threads: Array, grid: tuple[int, ...], block: tuple[int, ...], place: tuple[int, int, int]
) -> dict[str, Array]:
    steps = (1, block[0], block[0] * block[1])
    count = len(threads)
    out: dict[str, Any] = {
        "%laneid": threads % 32,
        "%warpid": threads // 32,
        "%nwarpid": count // 32,
        "%nsmid": 1,
        **dict.fromkeys(("%smid", "%clock", "%clock_hi", "%clock64", "%globaltimer"), 0),
        "%lanemask_eq": 1 << threads % 32,
        "%lanemask_lt": (1 << threads % 32) - 1,
        "%lanemask_le": (2 << threads % 32) - 1,
        "%lanemask_gt": 0xFFFFFFFF & -(2 << threads % 32),
        "%lanemask_ge": 0xFFFFFFFF & -(1 << threads % 32),
        "WARP_SZ": 32,
    }
    for i, axis in enumerate("xyz"):
        out[f"%tid.{axis}"] = threads // steps[i] % block[i]
        out[f"%ntid.{axis}"], out[f"%nctaid.{axis}"] = block[i], grid[i]
        out[f"%ctaid.{axis}"] = place[i]
    return {k: np.broadcast_to(v, (count,)).astype(np.uint32) for k, v in out.items()}


# ---- operands

Getter = Callable[[_Block], Array]
Setter = Callable[[_Block, Array, Array], None]
Work = Callable[[_Block, Array], None]


def _bits(operand: Operand, bits: int) -> Getter:
    """Reads an operand as unsigned of so many bits; 1 is a predicate."""
    if isinstance(operand, Number):
        if bits == 1:
            flag = np.array([operand.value != 0])
            return lambda block: flag
        number = np.array([operand.value & (2**bits - 1)], np.uint64).astype(UNSIGNED[bits])
        return lambda block: number
    if isinstance(operand, Not):
        positive = _bits(operand.register, bits)
        return lambda block: ~positive(block)
    if isinstance(operand, Symbol):
        name, offset = operand.name, operand.offset

        def symbol(block: _Block) -> Array:
            if name in block.registers:
                return block.registers[name]
            if name not in block.symbols:
                raise Unsupported(f"address of {name}")
            return np.array([block.symbols[name] + offset], np.uint64).astype(UNSIGNED[bits])

        return symbol
    if isinstance(operand, Group):
        part = bits // len(operand.items)
        getters = [_bits(item, part) for item in operand.items]

        def pack(block: _Block) -> Array:
            values = np.broadcast_arrays(*(get(block) for get in getters))
            return np.ascontiguousarray(np.stack(values, -1)).view(UNSIGNED[bits])[..., 0]

        return pack
    if not isinstance(operand, Register):
        raise Unsupported(f"operand {operand}")
    name = operand.name
    wanted = np.dtype(bool) if bits == 1 else np.dtype(UNSIGNED[bits])

    def register(block: _Block) -> Array:
        try:
            value = block.registers[name]
        except KeyError:
            raise Fault(f"{name} is read before it is written") from None
        return value if value.dtype == wanted else value.astype(wanted)

    return register


def _source(operand: Operand, type: str) -> Getter:
    """Reads an operand as the type's values."""
    get = _bits(operand, width(type))
    return lambda block: decode(get(block), type)


def _target(operand: Operand, type: str, program: Program) -> Setter:
    """Writes a type's bits to a register, or its parts to several."""
    if isinstance(operand, Group):
        part = width(type) // len(operand.items)
        setters = [_target(item, f"b{part}", program) for item in operand.items]

        def unpack(block: _Block, bits: Array, mask: Array) -> None:
            parts = np.ascontiguousarray(bits)[:, None].view(UNSIGNED[part])
            for i, put in enumerate(setters):
                put(block, np.ascontiguousarray(parts[:, i]), mask)

        return unpack
    if not isinstance(operand, Register):
        raise Unsupported(f"target {operand}")
    if operand.name == "_":
        return lambda block, bits, mask: None
    name, holds = operand.name, program.registers[operand.name]
    size = width(holds)
    if size == 1 or size == width(type):
        return lambda block, bits, mask: block.write(name, bits, mask)
    if size < width(type):
        raise Unsupported(f"{type} into a register of {size} bits")
    signed = type[0] == "s"

    def extend(block: _Block, bits: Array, mask: Array) -> None:
        value = bits.view(INTEGERS[type]) if signed else bits
        block.write(name, value.astype(INTEGERS[f"s{size}"]).view(UNSIGNED[size]), mask)

    return extend


def _address(operand: Operand) -> Getter:
    """uint64 over threads."""
    if not isinstance(operand, Address):
        raise Unsupported(f"address {operand}")
    base, offset = _bits(operand.base, 64), np.uint64(operand.offset & (2**64 - 1))
    return lambda block: np.broadcast_to(base(block) + offset, (block.count,))


def _space(opcode: tuple[str, ...]) -> str:
    words = [word.split("::")[0] for word in opcode]
    return next((w for w in words if w in WINDOWS), "generic")


# ---- instructions


@dataclasses.dataclass
class _Form:
    """How an instruction runs.

    Attributes:
      work: for all but control.
      control: from the program counter and the threads there to the threads at each next one.
      needed: threads that may go on, for instructions that a warp executes together.
    """

    work: Work | None = None
    control: Callable[[_Block, int, Array], list[tuple[int, Array]]] | None = None
    needed: Callable[[_Block, Array], Array] | None = None


class _Step:
    def __init__(self, instruction: Instruction, form: _Form) -> None:
        self.instruction, self.form, self.needed = instruction, form, form.needed
        self.guard = None if instruction.guard is None else _bits(instruction.guard, 1)

    def run(self, block: _Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
        chosen = mask if self.guard is None else mask & self.guard(block)
        skipped = [] if self.guard is None else [(pc + 1, mask & ~chosen)]
        if not chosen.any():
            return skipped
        if self.form.control:
            return self.form.control(block, pc, chosen) + skipped
        assert self.form.work
        self.form.work(block, chosen)
        return [(pc + 1, mask)]


def _together(block: _Block, mask: Array) -> Array:
    return block.whole_warps(mask)


def _members(operand: Operand) -> Callable[[_Block, Array], Array]:
    get = _bits(operand, 32)

    def needed(block: _Block, mask: Array) -> Array:
        members = np.broadcast_to(get(block), (block.count,)).reshape(-1, 32, 1)
        wanted = members >> np.arange(32, dtype=np.uint32) & np.uint32(1) != 0
        present = (mask | ~block.alive).reshape(-1, 1, 32)
        return (present | ~wanted).all(-1).reshape(-1)

    return needed


def _form(instruction: Instruction, program: Program) -> _Form:
    """The form of an instruction.

    Raises:
      Unsupported: with its text.
    """
    make = _MAKERS.get(instruction.opcode[0])
    try:
        if make is None:
            raise Unsupported("no such instruction here")
        return make(instruction, program)
    except (Unsupported, KeyError, ValueError, IndexError) as error:
        raise Unsupported(f"{instruction.text}: {error}") from None


def _same(instruction: Instruction, program: Program) -> _Form:
    name, type, mods = instruction.opcode[0], instruction.opcode[-1], instruction.opcode[1:-1]
    arity, operation = SAME[name]
    if name in ("div", "rcp", "sqrt") and "approx" in mods:
        mods = tuple(m for m in mods if m != "approx")
    if "cc" in mods or len(instruction.operands) != arity + 1:
        raise Unsupported("form")
    result = wide(type) if "wide" in mods else type
    types = [type, type, result][:arity]
    sources = [_source(o, t) for o, t in zip(instruction.operands[1:], types)]
    put = _target(instruction.operands[0], result, program)
    mode = next((m for m in mods if m in ("rz", "rm", "rp")), "rn")
    floats = PAIRS.get(type, type) in FLOATS
    flushes, saturates = floats and "ftz" in mods, "sat" in mods
    if saturates and not floats:
        raise Unsupported("integer saturation")

    def work(block: _Block, mask: Array) -> None:
        values = [get(block) for get in sources]
        if flushes:
            values = [flush(v, type) for v in values]
        value = operation(type, mods, *values)
        if saturates:
            value = saturate(value)
        bits = encode(value, result, mode)
        if flushes:
            bits = encode(flush(decode(bits, type), type), type)
        put(block, bits, mask)

    return _Form(work)


def _pure(
    instruction: Instruction,
    program: Program,
    result: str,
    types: Sequence[str],
    operation: Callable[..., Array],
) -> _Form:
    """Operands of the types to the bits of the result."""
    if len(instruction.operands) != len(types) + 1:
        raise Unsupported("form")
    sources = [_source(o, t) for o, t in zip(instruction.operands[1:], types)]
    put = _target(instruction.operands[0], result, program)

    def work(block: _Block, mask: Array) -> None:
        put(block, operation(*(get(block) for get in sources)), mask)

    return _Form(work)


def _count(i: Instruction, program: Program) -> _Form:
    type = i.opcode[-1]
    return _pure(i, program, "u32", [type], lambda a: COUNTS[i.opcode[0]](type, (), a))


def _shift(i: Instruction, program: Program) -> _Form:
    type = i.opcode[-1]
    operation = SHIFTS[i.opcode[0]]
    return _pure(
        i, program, type, [type, "u32"], lambda a, n: encode(operation(type, (), a, n), type)
    )


def _lop3(i: Instruction, program: Program) -> _Form:
    table = i.operands[4]
    if i.opcode != ("lop3", "b32") or not isinstance(table, Number):
        raise Unsupported("form")
    short = dataclasses.replace(i, operands=i.operands[:4])
    return _pure(short, program, "b32", ["b32"] * 3, lambda a, b, c: lop3(a, b, c, table.value))


def _prmt(i: Instruction, program: Program) -> _Form:
    if i.opcode != ("prmt", "b32"):
        raise Unsupported("mode")
    return _pure(i, program, "b32", ["b32"] * 3, prmt)


def _bfe(i: Instruction, program: Program) -> _Form:
    type = i.opcode[-1]
    return _pure(i, program, type, [type, "u32", "u32"], lambda *x: extract(type, *x))


def _bfi(i: Instruction, program: Program) -> _Form:
    type = i.opcode[-1]
    return _pure(i, program, type, [type, type, "u32", "u32"], lambda *x: insert(type, *x))


def _shf(i: Instruction, program: Program) -> _Form:
    return _pure(
        i, program, "b32", ["b32"] * 2 + ["u32"], lambda a, b, n: funnel(a, b, n, i.opcode)
    )


def _selp(i: Instruction, program: Program) -> _Form:
    type = f"b{width(i.opcode[-1])}"
    return _pure(i, program, type, [type, type, "pred"], lambda a, b, c: np.where(c, a, b))


def _mov(i: Instruction, program: Program) -> _Form:
    bits = width(i.opcode[-1])
    type = "pred" if bits == 1 else f"b{bits}"
    get, put = _bits(i.operands[1], bits), _target(i.operands[0], type, program)

    def work(block: _Block, mask: Array) -> None:
        put(block, np.broadcast_to(get(block), (block.count,)), mask)

    return _Form(work)


def _cvt(i: Instruction, program: Program) -> _Form:
    to, source, mods = i.opcode[-2], i.opcode[-1], i.opcode[1:-2]
    if "pack" in mods:
        raise Unsupported("pack")
    if to in PAIRS and source == "f32":

        def pair(high: Array, low: Array) -> Array:
            halves = [convert(v, source, PAIRS[to], mods) for v in (low, high)]
            return np.ascontiguousarray(np.stack(halves, -1)).view(np.uint32)[..., 0]

        return _pure(i, program, to, [source] * 2, pair)
    return _pure(i, program, to, [source], lambda v: convert(v, source, to, mods))


def _setp(i: Instruction, program: Program) -> _Form:
    type, mods = i.opcode[-1], i.opcode[2:-1]
    compare = COMPARISONS[i.opcode[1]]
    combine = next((m for m in mods if m in ("and", "or", "xor")), None)
    a, b = (_source(o, type) for o in i.operands[1:3])
    third = _bits(i.operands[3], 1) if combine else None
    targets = i.operands[0].items if isinstance(i.operands[0], Group) else (i.operands[0],)
    setters = [_target(t, "pred", program) for t in targets]
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

    def work(block: _Block, mask: Array) -> None:
        x, y = a(block), b(block)
        if "ftz" in mods:
            x, y = flush(x, type), flush(y, type)
        holds = compare(x, y)
        for put, value in zip(setters, (holds, ~holds)):
            put(block, join[combine](value, third(block)) if combine and third else value, mask)

    return _Form(work)


def _set(i: Instruction, program: Program) -> _Form:
    compare, to, type = COMPARISONS[i.opcode[1]], i.opcode[-2], i.opcode[-1]

    def operation(a: Array, b: Array) -> Array:
        one = np.where(compare(a, b), 1.0 if to in FLOATS else -1, 0)
        return encode(one, to)

    return _pure(i, program, to, [type] * 2, operation)


def _cvta(i: Instruction, program: Program) -> _Form:
    window = np.uint64(WINDOWS[_space(i.opcode)])
    down = i.opcode[1] == "to"
    return _pure(
        i, program, "u64", ["u64"], lambda a: np.asarray(a - window if down else a + window)
    )


def _vector(i: Instruction) -> int:
    return next((int(w[1:]) for w in i.opcode if w in ("v2", "v4", "v8")), 1)


def _ld(i: Instruction, program: Program) -> _Form:
    type, count, space = i.opcode[-1], _vector(i), _space(i.opcode)
    size = width(type) // 8
    items = i.operands[0].items if count > 1 else (i.operands[0],)  # type: ignore[union-attr]
    setters = [_target(item, type, program) for item in items]
    address = i.operands[1]
    if space == "param":
        load: Callable[[_Block, Array], Array] = _parameter(address, size * count)
    else:
        where = _address(address)

        def load(block: _Block, threads: Array) -> Array:
            return block.read(space, where(block)[threads], size * count, threads)

    def work(block: _Block, mask: Array) -> None:
        threads = np.flatnonzero(mask)
        raw = load(block, threads)
        for part, put in enumerate(setters):
            bits = np.zeros(block.count, UNSIGNED[size * 8])
            piece = np.ascontiguousarray(raw[:, part * size : (part + 1) * size])
            bits[threads] = piece.view(UNSIGNED[size * 8])[:, 0]
            put(block, bits, mask)

    return _Form(work)


def _parameter(address: Operand, size: int) -> Callable[[_Block, Array], Array]:
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise Unsupported("address of a parameter")
    name, at = address.base.name, address.offset

    def load(block: _Block, threads: Array) -> Array:
        values = block.parameters[name]
        if not 0 <= at <= values.shape[1] - size:
            raise Fault(f"byte {at} of parameter {name}")
        return values[threads, at : at + size]

    return load


def _st(i: Instruction, program: Program) -> _Form:
    type, count, space = i.opcode[-1], _vector(i), _space(i.opcode)
    bits = width(type)
    values = i.operands[1]
    items = values.items if count > 1 else (values,)  # type: ignore[union-attr]
    getters = [_bits(item, bits) for item in items]

    def raw(block: _Block, threads: Array) -> Array:
        parts = [np.broadcast_to(get(block), (block.count,))[threads] for get in getters]
        return np.ascontiguousarray(np.stack(parts, 1)).view(np.uint8)

    target = i.operands[0]
    if space == "param":
        name, at = target.base.name, target.offset  # type: ignore[union-attr]

        def keep(block: _Block, mask: Array) -> None:
            threads = np.flatnonzero(mask)
            block.parameters[name][threads, at : at + count * bits // 8] = raw(block, threads)

        return _Form(keep)
    where = _address(target)

    def work(block: _Block, mask: Array) -> None:
        threads = np.flatnonzero(mask)
        block.store(space, where(block)[threads], raw(block, threads), threads)

    return _Form(work)


def _param(i: Instruction, program: Program) -> _Form:
    target, source = (o.name for o in i.operands)  # type: ignore[union-attr]

    def work(block: _Block, mask: Array) -> None:
        block.parameters[target][mask] = block.parameters[source][mask]

    return _Form(work)


def _cp(i: Instruction, program: Program) -> _Form:
    words = i.opcode[1:]
    if words == ("async", "commit_group"):

        def commit(block: _Block, mask: Array) -> None:
            block.groups = block.groups + mask

        return _Form(commit)
    if words[:2] in (("async", "wait_group"), ("async", "wait_all")):
        pending = i.operands[0].value if i.operands else None  # type: ignore[union-attr]
        return _Form(lambda block, mask: block.land(mask, pending))
    if words[0] != "async" or words[1] not in ("ca", "cg"):
        raise Unsupported("form")
    where, origin = _address(i.operands[0]), _address(i.operands[1])
    size = i.operands[2].value  # type: ignore[union-attr]
    if size not in ({"cg": (16,), "ca": (4, 8, 16)}[words[1]]):
        raise Unsupported("size")
    extra = i.operands[3:] if not any("cache_hint" in w for w in words) else i.operands[3:-1]
    ignores = bool(extra) and program.registers.get(getattr(extra[0], "name", "")) == "pred"
    length = _bits(extra[0], 1 if ignores else 32) if extra else None

    def work(block: _Block, mask: Array) -> None:
        threads = np.flatnonzero(mask)
        valid = np.full(block.count, size)
        if length is not None:
            given = np.broadcast_to(length(block), (block.count,))
            valid = np.where(given, 0, size) if ignores else given.astype(np.int64)
            if (valid > size).any():
                raise Fault("source larger than the copy")
        values = np.zeros((block.count, size), np.uint8)
        for amount in np.unique(valid[threads]):
            some = threads[valid[threads] == amount]
            if amount == size:
                values[some] = block.read("global", origin(block)[some], size, some)
            for byte in range(amount if amount < size else 0):
                at = origin(block)[some] + np.uint64(byte)
                values[some, byte] = block.read("global", at, 1, some)[:, 0]
        addresses = where(block)
        block.shared.launch(addresses[threads], size, threads)
        block.copies.append(_Copy(mask.copy(), block.groups, addresses, values))

    return _Form(work)


def _mma(i: Instruction, program: Program) -> _Form:
    depth = {"m16n8k16": 16, "m16n8k8": 8}[i.opcode[3]]
    type = i.opcode[7]
    if i.opcode[1:3] != ("sync", "aligned") or i.opcode[4:6] != ("row", "col"):
        raise Unsupported("form")
    if i.opcode[6:] != ("f32", type, type, "f32") or type not in ("f16", "bf16"):
        raise Unsupported("types")
    groups = [o.items for o in i.operands]  # type: ignore[union-attr]
    if [len(g) for g in groups] != [4, depth // 4, depth // 8, 4]:
        raise Unsupported("registers")
    getters = [[_bits(o, 32) for o in group] for group in groups[1:]]
    setters = [_target(o, "b32", program) for o in groups[0]]

    def work(block: _Block, mask: Array) -> None:
        _check_whole(mask)
        parts = (
            np.stack([np.broadcast_to(get(block), (block.count,)) for get in group], -1)
            for group in getters
        )
        a, b, c = (p.reshape(block.warps, 32, -1) for p in parts)
        result = mma(a, b, c, type, depth).reshape(block.count, 4)
        for column, put in enumerate(setters):
            put(block, np.ascontiguousarray(result[:, column]), mask)

    return _Form(work, needed=_together)


def _check_whole(mask: Array) -> None:
    lanes = mask.reshape(-1, 32)
    if (lanes.any(-1) != lanes.all(-1)).any():
        raise Fault("not by all lanes of a warp")


def _matrix(i: Instruction, program: Program) -> _Form:
    words = i.opcode
    transposed = "trans" in words
    loads = words[0] == "ldmatrix"
    registers, address = i.operands if loads else i.operands[::-1]
    items = registers.items if isinstance(registers, Group) else (registers,)
    count = {"x1": 1, "x2": 2, "x4": 4}[next(w for w in words if w[0] == "x")]
    if "m8n8" not in words or words[-1] != "b16" or len(items) != count:
        raise Unsupported("form")
    space, where = _space(words), _address(address)
    setters = [_target(o, "b32", program) for o in items] if loads else []
    getters = [] if loads else [_bits(o, 32) for o in items]

    def place(block: _Block, mask: Array) -> tuple[Array, Array, Array]:
        _check_whole(mask)
        threads = np.flatnonzero(mask & (block.threads % 32 < 8 * count))
        addresses = where(block)[threads]
        if space == "generic":
            addresses = addresses - np.uint64(SHARED_WINDOW)
        return np.unique(threads // 32), threads, addresses

    def load(block: _Block, mask: Array) -> None:
        warps, threads, addresses = place(block, mask)
        raw = block.shared.read(addresses, 16, threads, together=True)
        out = spread(raw.view(np.uint16).reshape(len(warps), count, 8, 8), transposed)
        for matrix, put in enumerate(setters):
            bits = np.zeros((block.warps, 32), np.uint32)
            bits[warps] = out[:, matrix]
            put(block, bits.reshape(-1), mask)

    def store(block: _Block, mask: Array) -> None:
        warps, threads, addresses = place(block, mask)
        parts = [np.broadcast_to(get(block), (block.count,)).reshape(-1, 32) for get in getters]
        rows = gather(np.stack(parts, 1)[warps], transposed).reshape(-1, 8)
        block.shared.write(addresses, np.ascontiguousarray(rows).view(np.uint8), threads)

    return _Form(load if loads else store, needed=_together)


def _shfl(i: Instruction, program: Program) -> _Form:
    if i.opcode[1] != "sync" or i.opcode[3] != "b32":
        raise Unsupported("form")
    target = i.operands[0].items if isinstance(i.operands[0], Group) else (i.operands[0],)
    setters = [_target(o, t, program) for o, t in zip(target, ("b32", "pred"))]
    a, b, c = (_bits(o, 32) for o in i.operands[1:4])

    def work(block: _Block, mask: Array) -> None:
        value, operand, control = (
            np.broadcast_to(get(block), (block.count,)).reshape(-1, 32) for get in (a, b, c)
        )
        lanes, inside = shuffle(i.opcode[2], operand, control)
        present = np.take_along_axis(mask.reshape(-1, 32), lanes, -1)
        if (mask & ~present.reshape(-1)).any():
            raise Fault("takes the value of a lane that is not there")
        results = np.take_along_axis(value, lanes, -1), inside
        for put, result in zip(setters, results):
            put(block, result.reshape(-1), mask)

    return _Form(work, needed=_members(i.operands[4]))


def _vote(i: Instruction, program: Program) -> _Form:
    mode = i.opcode[2]
    source = _bits(i.operands[1], 1)
    put = _target(i.operands[0], i.opcode[-1], program)

    def work(block: _Block, mask: Array) -> None:
        flags = np.broadcast_to(source(block), (block.count,)) & mask
        lanes, there = flags.reshape(-1, 32), mask.reshape(-1, 32)
        if mode == "ballot":
            bits = (lanes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
            put(block, np.repeat(bits.astype(np.uint32), 32), mask)
            return
        every, some = (lanes | ~there).all(-1), lanes.any(-1)
        value = {"all": every, "any": some, "uni": every | ~some}[mode]
        put(block, np.repeat(value, 32), mask)

    return _Form(work, needed=_members(i.operands[2]))


def _activemask(i: Instruction, program: Program) -> _Form:
    put = _target(i.operands[0], "b32", program)

    def work(block: _Block, mask: Array) -> None:
        lanes = mask.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
        put(block, np.repeat(lanes.sum(-1).astype(np.uint32), 32), mask)

    return _Form(work)


def _elect(i: Instruction, program: Program) -> _Form:
    leader, chosen = i.operands[0].items  # type: ignore[union-attr]
    setters = _target(leader, "b32", program), _target(chosen, "pred", program)

    def work(block: _Block, mask: Array) -> None:
        first = np.repeat(mask.reshape(-1, 32).argmax(-1), 32)
        setters[0](block, first.astype(np.uint32), mask)
        setters[1](block, block.threads % 32 == first, mask)

    return _Form(work, needed=_members(i.operands[1]))


def _redux(i: Instruction, program: Program) -> _Form:
    type = i.opcode[-1]
    combine = _ATOMIC[i.opcode[2]]
    get, put = _source(i.operands[1], type), _target(i.operands[0], type, program)

    def work(block: _Block, mask: Array) -> None:
        values = np.broadcast_to(get(block), (block.count,)).copy()
        for warp in range(block.warps):
            lanes = np.flatnonzero(mask[warp * 32 :][:32]) + warp * 32
            if len(lanes):
                total = values[lanes[:1]]
                for lane in lanes[1:]:
                    total = combine(total, values[lane : lane + 1])
                values[lanes] = total
        put(block, encode(values, type), mask)

    return _Form(work, needed=_members(i.operands[2]))


_ATOMIC: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "exch": lambda a, b: b,
}


def _atom(i: Instruction, program: Program) -> _Form:
    type, space = i.opcode[-1], _space(i.opcode)
    name = next(w for w in i.opcode[1:] if w in _ATOMIC or w == "cas")
    if _vector(i) > 1:
        raise Unsupported("vector")
    returns = i.opcode[0] == "atom"
    operands = i.operands[1:] if returns else i.operands
    put = _target(i.operands[0], type, program) if returns else None
    where, sources = _address(operands[0]), [_bits(o, width(type)) for o in operands[1:]]
    size = width(type) // 8
    if len(sources) != (2 if name == "cas" else 1):
        raise Unsupported("form")

    def work(block: _Block, mask: Array) -> None:
        old = np.zeros(block.count, UNSIGNED[size * 8])
        addresses = where(block)
        given = [np.broadcast_to(get(block), (block.count,)) for get in sources]
        for thread in np.flatnonzero(mask):
            one = slice(thread, thread + 1)
            for memory, _, at in block._places(space, addresses[one]):
                before = Memory.read(memory, at, size, block.threads[one]).view(old.dtype)[:, 0]
                old[one] = before
                if name == "cas":
                    new = np.where(before == given[0][one], given[1][one], before)
                else:
                    values = decode(before, type), decode(given[0][one], type)
                    new = encode(_ATOMIC[name](*values), type)
                Memory.write(memory, at, new.view(np.uint8)[None], block.threads[one])
                if isinstance(memory, Shared):
                    memory.mark(at, size, block.threads[one])
        if put:
            put(block, old, mask)

    return _Form(work)


def _bra(i: Instruction, program: Program) -> _Form:
    target = program.labels[i.operands[0].name]  # type: ignore[union-attr]
    return _Form(control=lambda block, pc, mask: [(target, mask)])


def _ret(i: Instruction, program: Program) -> _Form:
    def leave(block: _Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
        block.alive = block.alive & ~mask
        return []

    return _Form(control=leave)


def _bar(i: Instruction, program: Program) -> _Form:
    words = [w for w in i.opcode[1:] if w != "cta"]
    if words[0] == "warp":

        def sync(block: _Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
            for warp in np.unique(block.threads[mask] // 32):
                block.clocks.leave(warp)
            return [(pc + 1, mask)]

        return _Form(control=sync, needed=_members(i.operands[0]))
    if words[0] not in ("sync", "arrive"):
        raise Unsupported("form")
    getters = [_bits(o, 32) for o in i.operands]
    aligned = i.opcode[0] == "bar" or "aligned" in words

    def arrive(block: _Block, pc: int, mask: Array) -> list[tuple[int, Array]]:
        values = [np.broadcast_to(get(block), (block.count,)) for get in getters]
        out: list[tuple[int, Array]] = []
        for barrier in np.unique(values[0][mask]):
            some = mask & (values[0] == barrier)
            counts = np.unique(values[1][some]) if len(values) > 1 else [None]
            if len(counts) > 1:
                raise Deadlock(f"barrier {barrier} is entered in two ways at once")
            expected = None if counts[0] is None else int(counts[0])
            out += block.arrive(int(barrier), expected, pc + 1, some, words[0] == "sync")
        return out

    return _Form(control=arrive, needed=_together if aligned else None)


def _trap(i: Instruction, program: Program) -> _Form:
    def stop(block: _Block, mask: Array) -> None:
        raise Fault(f"{i.opcode[0]} by thread {np.flatnonzero(mask)[0]}")

    return _Form(stop)


def _nothing(i: Instruction, program: Program) -> _Form:
    return _Form(lambda block, mask: None)


_MAKERS: dict[str, Callable[[Instruction, Program], _Form]] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(COUNTS, _count),
    **dict.fromkeys(SHIFTS, _shift),
    **dict.fromkeys(("ret", "exit"), _ret),
    **dict.fromkeys(("bar", "barrier"), _bar),
    **dict.fromkeys(("ldmatrix", "stmatrix"), _matrix),
    **dict.fromkeys(("atom", "red"), _atom),
    **dict.fromkeys(("trap", "brkpt"), _trap),
    **dict.fromkeys(
        ("membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep", "discard"),
        _nothing,
    ),
    "lop3": _lop3,
    "prmt": _prmt,
    "bfe": _bfe,
    "bfi": _bfi,
    "shf": _shf,
    "selp": _selp,
    "mov": _mov,
    "cvt": _cvt,
    "setp": _setp,
    "set": _set,
    "cvta": _cvta,
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "param": _param,
    "cp": _cp,
    "mma": _mma,
    "shfl": _shfl,
    "vote": _vote,
    "activemask": _activemask,
    "elect": _elect,
    "redux": _redux,
    "bra": _bra,
}
