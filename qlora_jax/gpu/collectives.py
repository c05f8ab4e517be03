"""Reads from a compiled program the data that devices exchange, and the work beside that."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.gpu import hlo
from qlora_jax.gpu.hlo import ENTRY, HloInstruction

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

START, DONE = "-start", "-done"
ASYNC = "async-start"
"""Opcode that starts all instructions of the computation it calls; its end names that one too."""

IDLE = (*hlo.FREE, "async-start", "async-done", "async-update", "after-all", "partition-id")
"""Operations that are no work for a device."""

_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_ALL = re.compile(r"\bnum_partitions=(\d+)")


class Collective(NamedTuple):
    """Arrays of one shape that devices exchange.

    Attributes:
      kind: one of `KINDS`.
      dtype: dtype in HLO's notation, such as u8 or bf16.
      shape: shape of the result on a device.
      devices: number of devices that take part.
      times: number of executions in one run of the program.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    times: int

    @property
    def received(self) -> int:
        """Returns the bytes that a device receives each time, in a ring algorithm."""
        size = math.prod(self.shape) * _width(self.dtype)
        others = self.devices - 1
        if self.kind == "reduce-scatter":
            return size * others
        if self.kind == "collective-permute":
            return size
        return size * others // self.devices * (2 if self.kind == "all-reduce" else 1)


class Gather(NamedTuple):
    """An all-gather of a compiled program, and the work that overlaps its transfer.

    Attributes:
      received: bytes that a device receives each time.
      times: number of executions in one run of the program.
      beside: number of operations that run between its start and its end.
      products: number of matrix products and kernels among these operations.
    """

    received: int
    times: int
    beside: int
    products: int


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, equal ones merged, those with the most bytes first.

    Args:
      text: HLO text of a compiled program, for GPUs or CPUs.
    """
    lines, devices = list(hlo.lines(text)), _all_devices(text)
    counts, ends = executions(lines), _ends(lines)
    found: dict[Collective, int] = collections.Counter()
    for line in lines:
        for one in _exchanged(line, ends, devices):
            found[one] += counts.get(line.computation, 0)
    made = [one._replace(times=times) for one, times in found.items() if times]
    return sorted(made, key=lambda one: -one.received * one.times)


def gathers(text: str) -> list[Gather]:
    """Returns the all-gathers of a scheduled program.

    Args:
      text: HLO text of a compiled program; instructions are in the order of their starts.
    """
    lines, devices = list(hlo.lines(text)), _all_devices(text)
    counts, ends = executions(lines), _ends(lines)
    bodies = _by_computation(lines)
    multiplying = {name for name, own in bodies.items() if any(map(_multiplies, own))}
    wrapped = {name for line in lines if line.opcode == ASYNC for name in _called(line)}
    made = []
    for name, own in bodies.items():
        places = {line.name: place for place, line in enumerate(own)}
        for place, line in enumerate(own):
            inside = [x for of in _called(line) for x in bodies[of]] if line.opcode == ASYNC else []
            sent = [x for x in (line, *inside) if _kind(x) == KINDS[0]]
            if not sent or name in wrapped:
                continue
            end = ends.get(line.name)
            beside = own[place + 1 : places[end.name]] if end is not None else []
            done = [other for other in beside if _works(other)]
            products = sum(_multiplies(x) or bool(_called(x) & multiplying) for x in done)
            received = sum(one.received for x in sent for one in _exchanged(x, ends, devices))
            made.append(Gather(received, counts.get(name, 0), len(done), products))
    return [gather for gather in made if gather.times]


def executions(lines: Sequence[HloInstruction]) -> dict[str, int]:
    """Returns the number of executions of each computation in one run of the program.

    A loop without a known trip count counts as one iteration. Each branch of a conditional counts
    as taken.
    """
    bodies = _by_computation(lines)
    counts: dict[str, int] = collections.Counter()

    def run(name: str, times: int) -> None:
        counts[name] += times
        for line in bodies.get(name, ()):
            trips = _TRIPS.search(line.rest) if line.opcode == "while" else None
            for called in _called(line):
                run(called, times * (int(trips[1]) if trips else 1))

    run(ENTRY, 1)
    return counts


def _by_computation(lines: Sequence[HloInstruction]) -> Mapping[str, list[HloInstruction]]:
    found: dict[str, list[HloInstruction]] = collections.defaultdict(list)
    for line in lines:
        found[line.computation].append(line)
    return found


def _called(line: HloInstruction) -> set[str]:
    if line.opcode in ("async-done", "async-update"):
        return set()
    branches = _BRANCHES.search(line.rest)
    names = re.findall(r"[\w.-]+", branches[1]) if branches else []
    return {*_CALLED.findall(line.rest), *names}


def _kind(line: HloInstruction) -> str | None:
    """Returns the kind of collective that an instruction is or starts; None if it is neither."""
    kind = line.opcode.removesuffix(START)
    return kind if kind in KINDS else None


def _ends(lines: Sequence[HloInstruction]) -> dict[str, HloInstruction]:
    """Maps the name of an instruction that starts an exchange to the one that waits for it."""
    return {
        line.operands[0]: line for line in lines if line.opcode.endswith(DONE) and line.operands
    }


def _exchanged(
    line: HloInstruction, ends: Mapping[str, HloInstruction], every: int
) -> Iterator[Collective]:
    kind = _kind(line)
    if kind is None:
        return
    # The result of a start may repeat its operands, so take the result of its end.
    result = ends[line.name].shape if line.opcode.endswith(START) else line.shape
    devices = _devices(line.rest) or every
    for dtype, sizes in _ARRAY.findall(result):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield Collective(kind, dtype, shape, devices, 0)


def _all_devices(text: str) -> int:
    found = _ALL.search(text)
    return int(found[1]) if found else 1


def _devices(rest: str) -> int | None:
    """Returns the number of devices that take part; None if none are named, which means all."""
    if listed := _LISTED.search(rest):
        return listed[1].count(",") + 1
    counted = _COUNTED.search(rest)
    return int(counted[1]) if counted else None


def _works(line: HloInstruction) -> bool:
    if line.opcode.removesuffix(DONE) in KINDS or _kind(line) is not None:
        return False
    return line.opcode not in IDLE


def _multiplies(line: HloInstruction) -> bool:
    return line.opcode in ("dot", "custom-call", "convolution")


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1
