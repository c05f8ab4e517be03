"""Which buffers of a compiled program hold a whole weight in floats."""

import math
import re
from collections.abc import Iterable

FLOATS = ("bf16", "f16", "f32", "f64")


def weight_shaped(hlo: str, shapes: Iterable[tuple[int, int]], layers: int = 1) -> list[str]:
    """The buffers that have as many floats as one of the weights, or as a stack of it.

    By number and not by shape, so that a transposed, flattened or blocked weight is found as well;
    other arrays of the program must not have these numbers. What a fusion computes on its way is
    no buffer.

    Args:
      hlo: `compiled.as_text()`.
      shapes: [K, N] of the weights.
      layers: of a stack.

    Returns:
      `name = shape` of each.
    """
    sizes = {k * n * times for k, n in shapes for times in (1, layers)}
    inner = set(re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", _fusions(hlo)))
    found = []
    name = ""
    for line in hlo.splitlines():
        if heading := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = heading[1]
        elif name not in inner and (value := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line)):
            shape = re.match(r"\(.*?\) |\S+ ", value[2])
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape[0] if shape else ""):
                size = math.prod(int(d) for d in dims.split(",") if d)
                if dtype in FLOATS and size in sizes:
                    found.append(f"{value[1]} = {dtype}[{dims}]")
    return found


def _fusions(hlo: str) -> str:
    """The lines whose called computations run without buffers of their own."""
    kinds = r" (?:fusion|reduce|map|sort|scatter|reduce-window|select-and-scatter|all-reduce)\("
    return "\n".join(line for line in hlo.splitlines() if re.search(kinds, line))
