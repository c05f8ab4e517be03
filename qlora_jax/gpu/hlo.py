"""Reads what a compiled program holds and runs from its text (`compiled.as_text()`)."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

FLOATS = ("bf16", "f16", "f32", "f64")

FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota")
"""Operations that move nothing."""

CONTROL = ("while", "conditional", "call", "custom-call", "async-start", "async-done")
"""Operations that only run others."""

WITHIN = ("fusion", "reduce", "map", "sort", "scatter", "reduce-window", "all-reduce")
"""Operations whose called computations have no buffers of their own."""


class HloInstruction(NamedTuple):
    """One instruction: where it stands, what it gives, what it takes and what follows that."""

    computation: str
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self) -> str:
        """Returns the computation that it applies, or nothing."""
        match = re.search(r"\b(?:calls|to_apply)=%?([\w.-]+)", self.rest)
        return match[1] if match else ""


class Operation(NamedTuple):
    """One instruction of a compiled program that runs on the device.

    Attributes:
      name: as in the HLO; its kernel's has `_` for `.`.
      multiplies: whether it is a matrix product.
      bytes: of operands and results.
    """

    name: str
    multiplies: bool
    bytes: int


ENTRY = "ENTRY"
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")
_HEADING = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


def lines(hlo: str) -> Iterator[HloInstruction]:
    """Yields all instructions; those of the entry have `ENTRY` for their computation."""
    computation = ""
    for text in hlo.splitlines():
        if heading := _HEADING.match(text):
            computation = ENTRY if heading[1] else heading[2]
        elif match := _LINE.match(text):
            name, shape, opcode, operands, rest = match.groups()
            names = tuple(re.findall(r"%([\w.-]+)", operands))
            yield HloInstruction(computation, name, shape, opcode, names, rest)


def operations(hlo: str) -> list[Operation]:
    """Returns what the entry of a program runs, with the bytes of its operands and results.

    Args:
      hlo: of a program without loops or branches.
    """
    all_lines = list(lines(hlo))
    multiplying = {line.computation for line in all_lines if line.opcode == "dot"}
    entry = [line for line in all_lines if line.computation == ENTRY]
    sizes = {line.name: _bytes(line.shape) for line in entry}
    return [
        Operation(
            line.name,
            _is_product(line) or line.called() in multiplying,
            sizes[line.name] + sum(sizes.get(operand, 0) for operand in line.operands),
        )
        for line in entry
        if line.opcode not in FREE
    ]


class Pass(NamedTuple):
    """An operation that reads or writes large arrays and multiplies no matrices.

    Attributes:
      name: as in the HLO.
      arrays: number of large ones that it reads and writes.
      origin: JAX's name of what it computes.
    """

    name: str
    arrays: int
    origin: str


def passes(hlo: str, least: int) -> list[Pass]:
    """Returns the work on large arrays that is no product.

    Operations of loops count once, custom calls (kernels) do not count.

    Args:
      hlo: text of any program.
      least: bytes from which on an array is large.
    """
    every = list(lines(hlo))
    within = {line.called() for line in every if line.opcode in WITHIN}
    multiplying = {line.computation for line in every if line.opcode == "dot"}
    large = {(line.computation, line.name): _large(line.shape, least) for line in every}
    found = []
    for line in every:
        if line.computation in within or line.opcode in (*FREE, *CONTROL):
            continue
        if _is_product(line) or line.called() in multiplying:
            continue
        names = (line.name, *line.operands)
        if arrays := sum(large.get((line.computation, name), 0) for name in names):
            origin = re.search(r'op_name="([^"]*)"', line.rest)
            found.append(Pass(line.name, arrays, origin[1] if origin else ""))
    return found


def _large(shape: str, least: int) -> int:
    return sum(_bytes(f"{dtype}[{dims}]") >= least for dtype, dims in _arrays(shape))


def weight_shaped(
    hlo: str,
    shapes: Iterable[tuple[int, int]],
    layers: int = 1,
    dtypes: Sequence[str] = FLOATS,
) -> list[str]:
    """Returns the buffers that have as many floats as one of the weights, or as a stack of it.

    By number and not by shape, so that a transposed, flattened or blocked weight is found as well;
    other arrays of the program must not have these numbers. What a fusion computes on its way is
    no buffer.

    Args:
      hlo: text of any program.
      shapes: [K, N] of the weights.
      layers: of a stack.
      dtypes: those to look for, named as in the HLO; a layer's codes are u8 of shape [K / 2, N].

    Returns:
      `name = shape` of each.
    """
    sizes = {k * n * times for k, n in shapes for times in (1, layers)}
    all_lines = list(lines(hlo))
    within = {line.called() for line in all_lines if line.opcode in WITHIN}
    return [
        f"{line.name} = {dtype}[{dims}]"
        for line in all_lines
        if line.computation not in within
        for dtype, dims in _arrays(line.shape)
        if dtype in dtypes and _count(dims) in sizes
    ]


def products_of(hlo: str, dtype: str) -> list[str]:
    """Returns the matrix products, fused and the libraries', with an operand of a dtype.

    Args:
      hlo: text of any program.
      dtype: as in the HLO: f32.
    """
    all_lines = list(lines(hlo))
    shapes = {(line.computation, line.name): line.shape for line in all_lines}
    return [
        line.name
        for line in all_lines
        if _is_product(line)
        and any(
            kind == dtype
            for operand in line.operands
            for kind, _ in _arrays(shapes.get((line.computation, operand), ""))
        )
    ]


def _is_product(line: HloInstruction) -> bool:
    return line.opcode == "dot" or (line.opcode == "custom-call" and "__cublas" in line.rest)


def _arrays(shape: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+)\[([\d,]*)\]", shape)


def _count(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


def _bytes(shape: str) -> int:
    return math.ceil(sum(_bits(dtype) * _count(dims) for dtype, dims in _arrays(shape)) / 8)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)  # f8e4m3fn: the first
    return int(digits[0]) if digits else 8
