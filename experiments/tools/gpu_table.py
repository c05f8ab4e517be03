"""Models the time of the kernels on absent GPUs, and shows when decoding first is faster.

Every product is compiled for every GPU. Registers, shared memory and the instructions of the main
loop are read from the machine code; `qlora_jax/gpu/roofline.py` computes a modelled time from them.

Expected: decoding inside the product moves a fifth of the bytes, so it can win at few rows; at many
  rows it wins if its main loop issues no slower than the tensor cores multiply.
Cost: about 10 minutes per implementation on 2 CPU cores; no GPU. Needs the extra `gpu-check`.
  With --only or --gpu, the file of --json keeps its records of all other products.
A GPU with a report of `qlora-jax bench gpu` gets a second table of times, at measured rates. This
  table compiles nothing. --only without a name, with --json, compiles nothing at all.
Command: python -m experiments.tools.gpu_table --write docs/gpu.md --json docs/gpu.json
  --rows prints the table FUSED_ROWS of qlora_jax/kernels/select.py, from the times in reports.
"""

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from experiments.tools import pages, program
from qlora_jax.gpu import kernel_rows, measured
from qlora_jax.gpu.case import DECODE_FIRST, DIRECTIONS, GpuProduct, tile
from qlora_jax.gpu.described import GPUS, read_gpu
from qlora_jax.gpu.measured import GpuReport
from qlora_jax.gpu.product import compile_all
from qlora_jax.gpu.times import seconds_at
from qlora_jax.kernels.select import EVERY, FUSED, usable
from qlora_jax.kernels.target import half_dtype

ROWS = (1, 16, 512, 2048, 8192)
SHAPES = ((4096, 4096), (4096, 11008))
SHOWN = (1, 16, 512)
"""Rows of x in the table of kernels; products with more rows use the same tiles."""

MARKS = pages.Marks("<!-- gpu_table.py begins -->", "<!-- gpu_table.py ends -->")
HMMA = 2 * 16 * 8 * 16
"""Flop of the usual tensor instruction, m16n8k16; others count as a multiple of it."""

REPORTS = Path(__file__).parents[2] / "docs" / "results" / "gpu"

Record = Mapping[str, Any]


def cases(gpus: Sequence[str]) -> list[GpuProduct]:
    """Returns all products, grouped by GPU and implementation."""
    found = []
    for gpu in gpus:
        capability = read_gpu(gpu).capability
        dtype = half_dtype(capability)
        for name in (DECODE_FIRST, *usable(capability, dtype)):
            for (k, n), m, direction in itertools.product(SHAPES, ROWS, DIRECTIONS):
                found.append(GpuProduct(gpu, name, m, k, n, dtype, direction))
    return found


def tables(records: Sequence[Record], reports: Sequence[GpuReport] = ()) -> str:
    """Returns Markdown tables: the kernels' resources, modelled times, times at measured rates."""
    parts = [
        f"Compiled, not run: jax {jax.__version__}, jaxlib {jaxlib.__version__}.",
        _kernels(records),
    ]
    for k, n in SHAPES:
        parts += [f"Modelled microseconds, W of {k} x {n}:", _times(records, (k, n))]
    for report in reports:
        if not (own := at_measured_rates(records, report)):
            continue
        for k, n in SHAPES:
            title = f"Microseconds on {report.device} at its measured rates (and measured)"
            parts += [f"{title}, W of {k} x {n}:", _times(own, (k, n))]
    return "\n\n".join(parts)


def at_measured_rates(records: Sequence[Record], report: GpuReport) -> list[Record]:
    """Returns the records of a report's GPU with `seconds` at its rates and `measured` or None."""
    found: list[Record] = []
    for r in records:
        rates = report.ceilings(r["dtype"])
        if r["gpu"] == report.gpu and rates is not None and not r["error"]:
            time = report.times.get(_case(r))
            found.append({**r, "seconds": seconds_at(r, rates), "measured": time})
    return found


def rows_table(reports: Sequence[GpuReport]) -> str:
    """Returns `FUSED_ROWS` as Python source, from the times of the reports."""
    lines = ["FUSED_ROWS: Mapping[str, Mapping[tuple[int, int], tuple[range, ...]]] = {"]
    for name, by_capability in kernel_rows.table(reports).items():
        lines.append(f'    "{name}": {{' + ("" if by_capability else "},"))
        for capability, rows in by_capability.items():
            texts = ", ".join(map(_range, rows)) + ("," if len(rows) == 1 else "")
            lines.append(f"        {capability}: ({texts}),")
        lines += ["    },"] if by_capability else []
    return "\n".join([*lines, "}"])


def _range(rows: range) -> str:
    stop = "EVERY" if rows.stop == EVERY else str(rows.stop)
    return f"range({rows.start}, {stop})" if rows.start else f"range({stop})"


def _case(record: Record) -> GpuProduct:
    return GpuProduct(*(record[field] for field in GpuProduct._fields))


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
        block = tile(_case(r))
        kernel = next(x for x in r["kernels"] if x["main_loop"].get("tensor"))
        resident = kernel["blocks_per_core"]
        threads = resident * kernel["launch"]["threads"] / read_gpu(r["gpu"]).threads_per_core
        count = kernel["main_loop_tensor_flop"] / HMMA
        lines.append(
            [
                *(name, r["gpu"], r["rows"], "x".join(map(str, block)), kernel["registers"]),
                f"{kernel['shared_bytes'] / 1e3:.1f}",
                f"{resident} ({threads:.0%})",
                # a tcgen05 instruction does not state the shape of its product
                f"{sum(kernel['main_loop'].values()) / count:.1f}" if count else "",
                f"{r['moved_bytes'] / r['floor_bytes']:.2f}",
            ]
        )
    return _markdown(head, lines)


def _times(records: Sequence[Record], shape: tuple[int, int]) -> str:
    chosen = [r for r in records if (r["k"], r["n"]) == shape and not r["error"] and r["seconds"]]
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
    return _markdown(head, lines)


def _cell(record: Record | None, others: Sequence[Record | None]) -> str:
    if record is None:
        return ""
    seconds = record["seconds"]
    text = f"{seconds['total'] * 1e6:.3g}"
    if record["implementation"] == DECODE_FIRST:
        text += f" ({seconds['decode'] * 1e6:.3g} + {seconds['product'] * 1e6:.3g})"
    else:
        text += " " + max(("bytes", "tensor", "issue"), key=seconds.__getitem__)
    if record.get("measured") is not None:
        text += f"; measured {record['measured'] * 1e6:.3g}"
    best = min(r["seconds"]["total"] for r in others if r is not None)
    return f"**{text}**" if math.isclose(seconds["total"], best) else text


def _markdown(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=GPUS)
    parser.add_argument("--only", nargs="*", choices=(DECODE_FIRST, *FUSED), help="implementations")
    parser.add_argument("--write", type=Path, help="page with the two markers; default: print")
    parser.add_argument("--json", type=Path, help="file of all the figures")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="folder; (%(default)s)")
    parser.add_argument("--rows", action="store_true", help="print FUSED_ROWS, and nothing else")
    options = parser.parse_args()
    reports = measured.reports(options.reports)
    if options.rows:
        print(rows_table(reports))
        return 0
    everything = cases(GPUS)
    known: dict[GpuProduct, Record] = {}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text("utf-8"))
        known = {_case(record): record for record in kept}
    asked = [
        case
        for case in everything
        if case.gpu in options.gpu and (options.only is None or case.implementation in options.only)
    ]
    for i, compiled in enumerate(compile_all(asked) if asked else ()):
        known[asked[i]] = compiled
        if options.json:  # after each product, so that an interrupt loses no figures
            kept = [known[case] for case in everything if case in known]
            options.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
        print(f"\r{i + 1} of {len(asked)}", end="", file=sys.stderr, flush=True)
    records = [known[case] for case in everything if case in known]
    for record in records:
        if record["error"]:
            print(f"{list(record.values())[:7]}: {record['error']}", file=sys.stderr)
    text = tables(records, reports)
    if options.write:
        pages.write(options.write, MARKS, text)
    else:
        print(text)
    return 1 if any(record["error"] for record in records) else 0


if __name__ == "__main__":
    program.run(main)
