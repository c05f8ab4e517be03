"""What would the kernels cost on GPUs that are not here, and when is decoding first quicker?

Every product is compiled for every GPU; registers, shared memory and the main loop's instructions
are read from the machine code, and `qlora_jax/memory/roofline.py` turns them into a modelled time.

Expected: decoding inside the product moves a fifth of the bytes, so it can win at few rows; at many
  rows it wins where its main loop issues no slower than the tensor cores multiply.
Cost: about 10 minutes per implementation on 2 CPU cores; no GPU. Needs the extra `gpu-check`.
  With --only or --gpu, what the file of --json holds of all others is kept.
Command: python experiments/gpu_table.py --write docs/gpu.md --json docs/gpu.json
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from qlora_jax.errors import UserError
from qlora_jax.kernels.fused import FUSED, usable
from qlora_jax.memory.compile import GPUS, read_gpu
from qlora_jax.memory.product import DECODE_FIRST, DIRECTIONS, Case, compile_all, tile

ROWS = (1, 16, 512, 2048, 8192)
SHAPES = ((4096, 4096), (4096, 11008))
SHOWN = (1, 16, 512)
"""Rows in the table of kernels; beyond, tiles stay the same."""

BEGIN, END = "<!-- gpu_table.py begins -->", "<!-- gpu_table.py ends -->"
HMMA = 2 * 16 * 8 * 16
"""Flop of the usual tensor instruction, by which others are counted."""

Record = Mapping[str, Any]


def cases(gpus: Sequence[str]) -> list[Case]:
    """All products, grouped by GPU and implementation."""
    found = []
    for gpu in gpus:
        capability = read_gpu(gpu).capability
        dtype = "bfloat16" if capability >= (8, 0) else "float16"
        for name in (DECODE_FIRST, *usable(capability, dtype)):
            for (k, n), m, direction in itertools.product(SHAPES, ROWS, DIRECTIONS):
                found.append(Case(gpu, name, m, k, n, dtype, direction))
    return found


def tables(records: Sequence[Record]) -> str:
    """Markdown: what the kernels are made of, then the modelled times."""
    return "\n\n".join(
        [
            f"Compiled, not run: jax {jax.__version__}, jaxlib {jaxlib.__version__}.",
            _kernels(records),
            *(_times(records, shape) for shape in SHAPES),
        ]
    )


def _kernels(records: Sequence[Record]) -> str:
    head = [
        *("kernel", "GPU", "rows", "tile", "registers", "shared memory, kB"),
        *("blocks (threads) per SM", "SASS per HMMA", "bytes : floor"),
    ]
    lines = []
    for r in records:
        fused = FUSED.get(r["implementation"])
        if fused is None or (r["k"], r["n"]) != SHAPES[0] or r["rows"] not in SHOWN:
            continue
        name = f"{r['implementation']} {r['direction']}"
        if r["error"]:
            lines.append([name, r["gpu"], r["rows"], r["error"], "", "", "", "", ""])
            continue
        block = tile(Case(*(r[field] for field in Case._fields)))
        kernel = next(x for x in r["kernels"] if x["main_loop_tensor_flop"])
        resident = kernel["blocks_per_core"]
        threads = resident * kernel["launch"]["threads"] / read_gpu(r["gpu"]).threads_per_core
        each = sum(kernel["main_loop"].values()) / (kernel["main_loop_tensor_flop"] / HMMA)
        lines.append(
            [
                *(name, r["gpu"], r["rows"], "x".join(map(str, block)), kernel["registers"]),
                f"{kernel['shared_bytes'] / 1e3:.1f}",
                f"{resident} ({threads:.0%})",
                f"{each:.1f}",
                f"{r['moved_bytes'] / r['floor_bytes']:.2f}",
            ]
        )
    return _markdown(head, lines)


def _times(records: Sequence[Record], shape: tuple[int, int]) -> str:
    chosen = [r for r in records if (r["k"], r["n"]) == shape and not r["error"]]
    rows = sorted({r["rows"] for r in chosen})
    head = ["direction", "GPU", "implementation", *(f"{m} row{'s' * (m > 1)}" for m in rows)]
    groups: dict[tuple[str, str], dict[str, dict[int, Record]]] = {}
    for r in chosen:
        group = groups.setdefault((r["direction"], r["gpu"]), {})
        group.setdefault(r["implementation"], {})[r["rows"]] = r
    lines = []
    for (direction, gpu), group in sorted(groups.items()):
        for name, by_rows in group.items():
            cells = [
                _cell(by_rows.get(m), [other.get(m) for other in group.values()]) for m in rows
            ]
            lines.append([direction, gpu, name, *cells])
    k, n = shape
    return f"Modelled microseconds, W of {k} x {n}:\n\n" + _markdown(head, lines)


def _cell(record: Record | None, others: Sequence[Record | None]) -> str:
    if record is None:
        return ""
    seconds = record["seconds"]
    text = f"{seconds['total'] * 1e6:.3g}"
    if record["implementation"] == DECODE_FIRST:
        text += f" ({seconds['decode'] * 1e6:.3g} + {seconds['product'] * 1e6:.3g})"
    else:
        text += " " + max(("bytes", "tensor", "issue"), key=seconds.__getitem__)
    best = min(r["seconds"]["total"] for r in others if r is not None)
    return f"**{text}**" if math.isclose(seconds["total"], best) else text


def _markdown(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def write(path: Path, text: str) -> None:
    """Puts the tables between the two markers of a page.

    Raises:
      UserError: the page has no markers.
    """
    page = path.read_text("utf-8")
    if BEGIN not in page or END not in page:
        raise UserError(f"{path}: add the lines {BEGIN} and {END} where the tables belong")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=GPUS)
    parser.add_argument("--only", nargs="*", choices=(DECODE_FIRST, *FUSED), help="implementations")
    parser.add_argument("--write", type=Path, help="page with the two markers; else printed")
    parser.add_argument("--json", type=Path, help="file of all the figures")
    options = parser.parse_args()
    everything = cases(GPUS)
    known: dict[Case, Record] = {}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text("utf-8"))
        known = {Case(*(record[field] for field in Case._fields)): record for record in kept}
    asked = [
        case
        for case in everything
        if case.gpu in options.gpu and (options.only is None or case.implementation in options.only)
    ]
    for i, record in enumerate(compile_all(asked) if asked else ()):
        known[asked[i]] = record
        if options.json:  # at once: an hour's figures outlive an interrupt
            kept = [known[case] for case in everything if case in known]
            options.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
        print(f"\r{i + 1} of {len(asked)}", end="", file=sys.stderr, flush=True)
    records = [known[case] for case in everything if case in known]
    for record in records:
        if record["error"]:
            print(f"{list(record.values())[:7]}: {record['error']}", file=sys.stderr)
    text = tables(records)
    if options.write:
        write(options.write, text)
    else:
        print(text)
    return 1 if any(record["error"] for record in records) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
