"""Reads the largest temporaries of a compiled program, and the source lines that make them.

XLA writes both into a folder (`xla_dump_to`): the sizes in the buffer assignment, and the source
lines in the instructions of the program.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qlora_jax.runtime import paths

_VALUE = re.compile(r"value: <\d+ ([\w.-]+)\S* @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_MADE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = .*metadata=\{(.*?)\}")
_ENTRY = re.compile(r"(\d+) (?:\{(.*)\}|\"(.*)\")$")


class Temporary(NamedTuple):
    """An offset in a program's temporary memory, and the largest value stored there.

    Attributes:
      bytes: bytes of the value.
      shape: dtype and axes of the value.
      operation: end of the operation's name in JAX.
      source: file:line in this package; "" if the compiler does not give it.
    """

    bytes: int
    shape: str
    operation: str
    source: str


def temporaries(folder: Path, count: int) -> list[Temporary]:
    """Returns the largest temporaries of the program that was dumped last, one for each offset.

    Args:
      folder: folder that `xla_dump_to` named.
      count: largest number of temporaries to return.
    """
    assignments = sorted(folder.glob("*after_optimizations-buffer-assignment.txt"))
    if not assignments:
        return []
    text = assignments[-1].read_text(encoding="utf-8")
    program = (
        assignments[-1]
        .with_name(assignments[-1].name.replace("-buffer-assignment", ""))
        .read_text(encoding="utf-8")
    )
    places: dict[int, tuple[int, str, str]] = {}
    for name, size, offset, shape in _values(text):
        if size > places.get(offset, (0,))[0]:
            places[offset] = size, name, shape
    origins = _origins(program)
    largest = sorted(places.values(), reverse=True)[:count]
    return [
        Temporary(size, shape.partition("{")[0], *origins.get(name, ("", "")))
        for size, name, shape in largest
    ]


def _values(text: str) -> Iterator[tuple[str, int, int, str]]:
    for block in re.split(r"\n(?=allocation )", text):
        heading, _, rest = block.partition("\n")
        if "preallocated-temp" in heading:
            for match in _VALUE.finditer(rest):
                yield match[1], int(match[2]), int(match[3]), match[4]


def _origins(program: str) -> dict[str, tuple[str, str]]:
    """Returns name of an instruction to (operation, source)."""
    frames = _frames(program)
    found = {}
    for match in _MADE.finditer(program):
        data = match[2]
        operation = re.search(r'op_name="([^"]*)"', data)
        frame = re.search(r"stack_frame_id=(\d+)", data)
        file = re.search(r'source_file="([^"]*)".*?source_line=(\d+)', data)
        source = frames.get(int(frame[1]), "") if frame else ""
        if file and (name := paths.in_package(file[1])):
            source = f"{name}:{file[2]}"
        found[match[1]] = "/".join(operation[1].split("/")[-2:]) if operation else "", source
    return found


def _frames(program: str) -> dict[int, str]:
    """Returns id of a stack frame to the innermost line of this package in the stack."""
    files = {i: paths.in_package(text) for i, text in _table(program, "FileNames").items()}
    lines: dict[int, str] = {}
    for i, text in _table(program, "FileLocations").items():
        fields = _fields(text)
        name = files.get(fields.get("file_name_id", 0), "")
        lines[i] = f"{name}:{fields.get('line', 0)}" if name else ""
    frames = {i: _fields(text) for i, text in _table(program, "StackFrames").items()}

    def innermost(i: int) -> str:
        seen = set()
        while i in frames and i not in seen:
            seen.add(i)
            if line := lines.get(frames[i].get("file_location_id", 0), ""):
                return line
            i = frames[i].get("parent_frame_id", 0)
        return ""

    return {i: innermost(i) for i in frames}


def _table(program: str, heading: str) -> Mapping[int, str]:
    match = re.search(rf"^{heading}\n((?:\d+ .*\n)*)", program, re.MULTILINE)
    rows = (_ENTRY.match(line) for line in (match[1].splitlines() if match else []))
    return {int(row[1]): row[2] or row[3] for row in rows if row}


def _fields(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}
