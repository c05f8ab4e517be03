"""One thread block: its registers, memories, pending copies, barriers and execution loop."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_emulator.memory import Clocks, Fault, Memory, Shared
from ptx_emulator.text import Program, PtxError, Unsupported, Variable

if TYPE_CHECKING:
    from ptx_emulator.form import Step

Array = np.ndarray

GLOBAL = 0x7_0000_0000
SHARED = 1024
SHARED_WINDOW = 0x10_0000_0000
LOCAL_WINDOW = 0x20_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0, "param": 0}
WINDOW_SIZE = 1 << 32


class Deadlock(PtxError):
    """Threads wait for other threads that never arrive, or a block does not end."""


class LocalMemory:
    """The local memory of each thread."""

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
class AsyncCopy:
    """A cp.async, as arrays over all threads; `mask` marks the threads whose copy is pending."""

    mask: Array
    group: Array
    addresses: Array
    values: Array


@dataclasses.dataclass
class Barrier:
    expected: int
    arrived: Array
    waiting: dict[int, Array]
    known: Array


class Block:
    """One thread block; a register is an unsigned array over the block's threads."""

    def __init__(
        self,
        program: Program,
        code: "list[Step]",
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
        self.barriers: dict[int, Barrier] = {}
        self.copies: list[AsyncCopy] = []
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
        self.local = LocalMemory(count, local)
        self.parameters = {n: np.broadcast_to(v, (count, len(v))) for n, v in values.items()}
        self.parameters |= {
            v.name: np.zeros((count, v.size or 0), np.uint8)
            for v in program.variables
            if v.space == "param"
        }
        self.registers: dict[str, Array] = special_registers(self.threads, grid, block, place)

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
        """Returns the threads of the warps whose running threads are all in `mask`."""
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

    def places(self, space: str, addresses: Array) -> list[tuple[Any, Array, Array]]:
        """Returns each memory, its positions in `addresses`, and the addresses in the memory."""
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
        """Loads `size` bytes per thread; returns uint8 [threads, size]."""
        out = np.empty((len(threads), size), np.uint8)
        for memory, part, at in self.places(space, addresses):
            out[part] = memory.read(at, size, threads[part])
        return out

    def store(self, space: str, addresses: Array, values: Array, threads: Array) -> None:
        for memory, part, at in self.places(space, addresses):
            memory.write(at, values[part], threads[part])

    def land(self, mask: Array, pending: int | None) -> None:
        """Completes the copies of the threads in `mask`, except in their last `pending` groups.

        If `pending` is None, completes all copies, also those that are in no group yet.
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
        """Lets the threads of `mask` arrive at a barrier; returns the released threads.

        Returns:
          Pairs of the next program counter and the mask of threads that continue there.
        """
        expected = expected or self.count
        if expected % 32 or expected > self.count:
            raise Fault(f"barrier {barrier} for {expected} of {self.count} threads")
        at = self.barriers.setdefault(
            barrier,
            Barrier(expected, np.zeros(self.count, bool), {}, np.zeros(self.warps, np.int64)),
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


def special_registers(
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
