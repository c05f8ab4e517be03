"""Launches a kernel: places its arguments in memory and runs its blocks one after another."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx_emulator.block import GLOBAL, Block
from ptx_emulator.form import Step
from ptx_emulator.instructions import form_of
from ptx_emulator.memory import Memory
from ptx_emulator.text import PtxError, parse
from ptx_emulator.values import UNSIGNED


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
      ptx: text of the PTX module.
      grid: number of blocks along x, y and z; missing axes are 1.
      block: number of threads along x, y and z, in total a multiple of 32; missing axes are 1.
      arguments: arguments of the kernel, in order: a contiguous array for a pointer, which the
        kernel changes in place, or a numpy scalar.
      shared: bytes of dynamic shared memory.
      entry: name of the kernel; None if the module has only one.
      limit: largest number of instructions of one block.

    Raises:
      Unsupported: the emulator does not know an instruction.
      Fault, Race, Deadlock: the kernel is wrong; the message holds the instruction.
    """
    program = parse(ptx, entry)
    code = [Step(i, form_of(i, program)) for i in program.instructions]
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
            Block(program, code, device, symbols, values, sizes, (x, y, z), shared).run(limit)
    for buffer, (at, size) in zip(buffers, spans):
        buffer[...] = device.data[at : at + size].view(buffer.dtype).reshape(buffer.shape)
