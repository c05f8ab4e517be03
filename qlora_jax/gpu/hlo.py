"""Reads the buffers and operations of a compiled program from `compiled.as_text()`."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

FLOATS = ("bf16", "f16", "f32", "f64")

FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota")
"""Operations that move no bytes."""

CONTROL = ("while", "conditional", "call", "custom-call", "async-start", "async-done")
"""Operations that only run others."""

WITHIN = ("fusion", "reduce", "map", "sort", "scatter", "reduce-window", "all-reduce")
"""Operations whose called computations have no buffers of their own."""


class HloInstruction(NamedTuple):
    """One instruction: its computation, name, result, opcode, operands, and the text after them."""

    computation: str
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self) -> str:
        """Returns the name of the computation that it applies; empty if it applies none."""
        match = re.search(r"\b(?:calls|to_apply)=%?([\w.-]+)", self.rest)
        return match[1] if match else ""


class Operation(NamedTuple):
    """One instruction of a compiled program that runs on the device.

    Attributes:
      name: name in the HLO; the name of its kernel has `_` for `.`.
      multiplies: whether it is a matrix product.
      bytes: bytes of operands and results.
    """

    name: str
    multiplies: bool
    bytes: int


ENTRY = "ENTRY"
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")
_HEADING = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


def lines(hlo: str) -> Iterator[HloInstruction]:
    """Yields all instructions; `computation` is `ENTRY` for those of the entry."""
    computation = ""
    for text in hlo.splitlines():
        if heading := _HEADING.match(text):
            computation = ENTRY if heading[1] else heading[2]
        elif match := _LINE.match(text):
            name, shape, opcode, operands, rest = match.groups()
            names = tuple(re.findall(r"%([\w.-]+)", operands))
            yield HloInstruction(computation, name, shape, opcode, names, rest)


def operations(hlo: str) -> list[Operation]:
    """Returns the operations of a program's entry, with the bytes of operands and results.

    Args:
      hlo: text of a program without loops or branches.
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
      name: name in the HLO.
      arrays: number of large arrays that it reads and writes.
      origin: JAX's name of the computed operation.
    """

    name: str
    arrays: int
    origin: str


def passes(hlo: str, least: int) -> list[Pass]:
    """Returns the operations on large arrays that are no matrix products.

    An operation in a loop counts once. Custom calls (kernels) do not count.

    Args:
      hlo: text of any program.
      least: least bytes of a large array.
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
    """Returns the buffers with as many elements as one of the weights, or as a stack of it.

    The number of elements is compared and not the shape, so that a transposed, flattened or blocked
    weight is found too. Other arrays of the program must not have these numbers of elements. Values
    inside a fusion are no buffers.

    Args:
      hlo: text of any program.
      shapes: shapes [K, N] of the weights.
      layers: number of layers of a stack.
      dtypes: dtypes to look for, named as in the HLO; a layer's codes are u8 of shape [K / 2, N].

    Returns:
      `name = shape` of each buffer.
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
    """Returns the names of the matrix products, fused or in libraries, with an operand of a dtype.

    Args:
      hlo: text of any program.
      dtype: dtype in the HLO's notation, such as f32.
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
    digits = re.search(r"\d+", dtype)  # the first number: f8e4m3fn has 8 bits
    return int(digits[0]) if digits else 8
