"""Reads from a compiled program what its devices send each other, and what hides it."""

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
"""Starts what the computation that it calls holds; its end names that computation too."""

IDLE = (*hlo.FREE, "async-start", "async-done", "async-update", "after-all", "partition-id")
"""Operations that give a device nothing to do."""

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
      dtype: as HLO writes it, u8 or bf16.
      shape: shape of the result on a device.
      devices: number of devices that take part.
      times: how often a program does it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    times: int

    @property
    def received(self) -> int:
        """Bytes that a device receives each time, if they take the way round a ring."""
        size = math.prod(self.shape) * _width(self.dtype)
        others = self.devices - 1
        if self.kind == "reduce-scatter":
            return size * others
        if self.kind == "collective-permute":
            return size
        return size * others // self.devices * (2 if self.kind == "all-reduce" else 1)


class Gather(NamedTuple):
    """An all-gather of a compiled program, and what is done while its bytes are on their way.

    Attributes:
      received: bytes that a device receives, each time.
      times: how often the program does it.
      beside: operations that run between its start and its end.
      products: matrix products and kernels among them.
    """

    received: int
    times: int
    beside: int
    products: int


def collectives(text: str) -> list[Collective]:
    """Returns what a program exchanges, equal ones as one, the most bytes first.

    Args:
      text: a compiled program's, for GPUs or CPUs.
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
      text: a compiled program's, whose instructions are in the order in which they start.
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
    """Returns how often each computation runs in a run of the program.

    A loop whose number of turns the compiler does not tell counts as one turn, and each branch of
    a conditional as taken.
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
    """Returns which collective an instruction is or starts; None if it is none."""
    kind = line.opcode.removesuffix(START)
    return kind if kind in KINDS else None


def _ends(lines: Sequence[HloInstruction]) -> dict[str, HloInstruction]:
    """Maps the name of what starts an exchange to the instruction that waits for it."""
    return {
        line.operands[0]: line for line in lines if line.opcode.endswith(DONE) and line.operands
    }


def _exchanged(
    line: HloInstruction, ends: Mapping[str, HloInstruction], every: int
) -> Iterator[Collective]:
    kind = _kind(line)
    if kind is None:
        return
    # the result of a start may repeat its operands
    result = ends[line.name].shape if line.opcode.endswith(START) else line.shape
    devices = _devices(line.rest) or every
    for dtype, sizes in _ARRAY.findall(result):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield Collective(kind, dtype, shape, devices, 0)


def _all_devices(text: str) -> int:
    found = _ALL.search(text)
    return int(found[1]) if found else 1


def _devices(rest: str) -> int | None:
    """Returns how many take part; None where the instruction does not say, which are all."""
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
