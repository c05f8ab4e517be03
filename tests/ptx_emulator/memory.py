"""Byte-addressed memory that raises on errors of a kernel: bounds, alignment, races."""

from collections.abc import Sequence

import numpy as np

from ptx_emulator.text import PtxError

Array = np.ndarray

GAP = 1 << 16
POISON = 0xFF
NOBODY, SEVERAL = -1, -2


class Fault(PtxError):
    """An access that is out of bounds or misaligned, or reads bytes that nothing wrote."""


class Race(PtxError):
    """Threads access the same byte of shared memory without a barrier between the accesses."""


class Memory:
    """Allocations with gaps between them, in which an access is a fault.

    Attributes:
      base: address of `data[0]`, a multiple of 1024.
      data: contents, uint8 [bytes].
      usable: whether a byte may be accessed, bool [bytes]; false in the gaps.
    """

    def __init__(self, base: int, sizes: Sequence[int], gap: int = GAP) -> None:
        """Lays out allocations of `sizes` bytes, each at a multiple of 1024."""
        self.base, at, self.offsets = base, gap, []
        for size in sizes:
            self.offsets.append(at)
            at += -(-size // 1024) * 1024 + gap
        self.data = np.full(at, POISON, np.uint8)
        self.usable = np.zeros(at, bool)
        for offset, size in zip(self.offsets, sizes):
            self.usable[offset : offset + size] = True

    def address(self, i: int) -> int:
        return self.base + self.offsets[i]

    def rows(self, addresses: Array, size: int, threads: Array) -> Array:
        """Returns one index per thread into arrays of shape [bytes / size, size].

        Raises:
          Fault: an address is out of bounds or not a multiple of `size`.
        """
        offsets = addresses.astype(np.int64) - self.base
        inside = (offsets >= 0) & (offsets + size <= len(self.data))
        if inside.all():
            aligned = offsets % size == 0
            if not aligned.all():
                raise self._fault("is not aligned", ~aligned, addresses, size, threads)
            rows = offsets // size
            inside = self.usable.reshape(-1, size)[rows].all(-1)
            if inside.all():
                return rows
        raise self._fault("is out of bounds", ~inside, addresses, size, threads)

    @staticmethod
    def _fault(what: str, bad: Array, addresses: Array, size: int, threads: Array) -> Fault:
        first = np.flatnonzero(bad)[0]
        return Fault(
            f"{size} bytes at {int(addresses[first]):#x} by thread {threads[first]}: "
            f"{what} ({bad.sum()} of {len(bad)} threads)"
        )

    def read(self, addresses: Array, size: int, threads: Array) -> Array:
        """Loads `size` bytes per thread; returns uint8 [threads, size]."""
        return self.data.reshape(-1, size)[self.rows(addresses, size, threads)]

    def write(self, addresses: Array, values: Array, threads: Array) -> None:
        """Stores `values`, uint8 [threads, size]."""
        size = values.shape[1]
        self.data.reshape(-1, size)[self.rows(addresses, size, threads)] = values


class Clocks:
    """Vector clocks: which events of other warps a warp has synchronized with, by barriers.

    An event of warp w gets the clock `now[w]`. Warp v may rely on the event once `seen[v, w]`
    reaches that clock. `seen[v, v]` is below `now[v]`, because lanes of one warp need a barrier,
    too.
    """

    def __init__(self, warps: int) -> None:
        self.now = np.ones(warps, np.int64)
        self.seen = np.zeros((warps, warps), np.int64)

    def leave(self, warp: int) -> Array:
        """Ends the current clock of a warp; returns the clocks that other warps learn from it."""
        self.seen[warp, warp] = self.now[warp]
        self.now[warp] += 1
        return self.seen[warp].copy()

    def join(self, warp: int, known: Array) -> None:
        self.seen[warp] = np.maximum(self.seen[warp], known)


class Shared(Memory):
    """The shared memory of a block, initially poisoned, with the last accesses of every byte.

    A read raises if nothing wrote the byte, if a cp.async in flight will write it, or if another
    thread wrote it and no barrier came after the write. A write raises if a cp.async in flight will
    write the byte, or if another thread read it, or wrote another value, and no barrier came since.
    """

    def __init__(self, base: int, size: int, clocks: Clocks) -> None:
        super().__init__(base, [size], gap=0)
        length, warps = len(self.data), len(clocks.now)
        self.clocks = clocks
        self.writer = np.full(length, NOBODY, np.int32)
        self.written = np.zeros(length, np.int64)
        self.reader = np.full((length, warps), NOBODY, np.int32)
        self.was_read = np.zeros((length, warps), np.int64)
        self.in_flight = np.full(length, NOBODY, np.int32)

    def read(self, addresses: Array, size: int, threads: Array, together: bool = False) -> Array:
        """Loads `size` bytes per thread; returns uint8 [threads, size].

        With `together`, the read counts for every lane of the warp.
        """
        rows = self.rows(addresses, size, threads)
        warps = threads // 32
        writer = self.writer.reshape(-1, size)[rows]
        self._refuse(writer == NOBODY, "read before anything wrote it", writer, addresses, threads)
        self._landed(rows, size, addresses, threads)
        unseen = (
            self.written.reshape(-1, size)[rows] > self.clocks.seen[warps[:, None], writer // 32]
        )
        if not together:
            unseen &= writer != threads[:, None]
        self._refuse(
            unseen, "read without a barrier after its write by", writer, addresses, threads
        )
        count = self.reader.shape[1]
        reader = self.reader.reshape(-1, size, count)
        was_read = self.was_read.reshape(-1, size, count)
        new = was_read[rows, :, warps] != self.clocks.now[warps][:, None]
        owner = np.where(together, SEVERAL, threads)[:, None]
        before = reader[rows, :, warps]
        reader[rows, :, warps] = np.where(new | (before == owner), owner, SEVERAL)
        lost, byte = np.nonzero(reader[rows, :, warps] != owner)
        reader[rows[lost], byte, warps[lost]] = SEVERAL
        was_read[rows, :, warps] = self.clocks.now[warps][:, None]
        return self.data.reshape(-1, size)[rows]

    def write(self, addresses: Array, values: Array, threads: Array) -> None:
        size = values.shape[1]
        rows = self.rows(addresses, size, threads)
        self._landed(rows, size, addresses, threads)
        self._store(rows, values, addresses, threads)

    def launch(self, addresses: Array, size: int, threads: Array) -> None:
        """Records that a cp.async will write these bytes."""
        rows = self.rows(addresses, size, threads)
        self._landed(rows, size, addresses, threads)
        self._unread(rows, size, addresses, threads)
        self.in_flight.reshape(-1, size)[rows] = threads[:, None]

    def land(self, addresses: Array, values: Array, threads: Array) -> None:
        """Stores the bytes of a completed cp.async."""
        size = values.shape[1]
        rows = self.rows(addresses, size, threads)
        self.in_flight.reshape(-1, size)[rows] = NOBODY
        self._store(rows, values, addresses, threads)

    def mark(self, addresses: Array, size: int, threads: Array) -> None:
        """Records the write of an atomic operation, which needs no barrier."""
        rows = self.rows(addresses, size, threads)
        self.writer.reshape(-1, size)[rows] = threads[:, None]
        self.written.reshape(-1, size)[rows] = self.clocks.now[threads // 32][:, None]

    def _store(self, rows: Array, values: Array, addresses: Array, threads: Array) -> None:
        size = values.shape[1]
        self._unread(rows, size, addresses, threads)
        warps = threads // 32
        data, writer, written = (
            x.reshape(-1, size) for x in (self.data, self.writer, self.written)
        )
        before = writer[rows]
        unseen = written[rows] > self.clocks.seen[warps[:, None], before // 32]
        unseen &= (before != NOBODY) & (before != threads[:, None]) & (data[rows] != values)
        self._refuse(
            unseen, "written without a barrier after its write by", before, addresses, threads
        )
        data[rows], writer[rows] = values, threads[:, None]
        written[rows] = self.clocks.now[warps][:, None]
        self._refuse(data[rows] != values, "written otherwise by", writer[rows], addresses, threads)

    def _unread(self, rows: Array, size: int, addresses: Array, threads: Array) -> None:
        warps, count = threads // 32, self.reader.shape[1]
        reader = self.reader.reshape(-1, size, count)[rows]
        unseen = self.was_read.reshape(-1, size, count)[rows] > self.clocks.seen[warps][:, None]
        unseen &= reader != threads[:, None, None]
        if unseen.any():
            worst = unseen.argmax(-1)[..., None]
            who = np.take_along_axis(reader, worst, -1)[..., 0]
            what = "written without a barrier after its read by"
            self._refuse(unseen.any(-1), what, who, addresses, threads)

    def _landed(self, rows: Array, size: int, addresses: Array, threads: Array) -> None:
        owner = self.in_flight.reshape(-1, size)[rows]
        what = "touched while a cp.async is in flight of"
        self._refuse(owner != NOBODY, what, owner, addresses, threads)

    def _refuse(self, bad: Array, what: str, who: Array, addresses: Array, threads: Array) -> None:
        if bad.any():
            thread, byte = np.argwhere(bad)[0]
            other = {NOBODY: "", SEVERAL: "several threads"}.get(
                int(who[thread, byte]), f"thread {who[thread, byte]}"
            )
            at = int(addresses[thread]) + int(byte) - self.base
            kind = Fault if other == "" else Race
            raise kind(f"shared byte {at} {what} {other}; now thread {threads[thread]}")
