"""Checks that the kernels and the programs of `qlora-jax bench gpu` compile for absent GPUs.

Expected: every implementation of `kernels/select.py` compiles, in each of its dtypes, for every GPU
  that it supports: no spilled register, no more shared memory than the GPU has, no buffer of the
  weight in floats. On a T4, which has no such kernel, products of float16 stay float16. Every
  program of `bench gpu` compiles for an h100 and an a100 without an error.
Cost: half an hour on 2 CPU cores; no GPU, no driver. Needs the extra `gpu-check`.
Command: make gpu-check
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.tools import program
from qlora_jax.bench.gpu import compile_check
from qlora_jax.gpu.case import DECODE_FIRST, DIRECTIONS, GpuProduct
from qlora_jax.gpu.described import GPUS, read_gpu
from qlora_jax.gpu.product import compile_all
from qlora_jax.kernels.select import FUSED, usable
from qlora_jax.runtime.display import counted

PRODUCTS = ((1, 4096, 4096), (32, 4096, 4096), (512, 4096, 4096), (512, 4096, 11008))
"""Rows, K and N. Several shapes, because registers that suffice for one may not for another."""

PLAIN = tuple(gpu for gpu in GPUS if not usable(read_gpu(gpu).capability, "float16"))
"""GPUs without a fused kernel."""


def cases() -> list[GpuProduct]:
    """Returns every kernel for every GPU, and decoding first for the GPUs without a kernel."""
    fused = [
        GpuProduct(gpu, name, *product, dtype, direction)
        for gpu, name in itertools.product(GPUS, FUSED)
        for product, dtype, direction in itertools.product(PRODUCTS, FUSED[name].dtypes, DIRECTIONS)
        if name in usable(read_gpu(gpu).capability, dtype)
    ]
    plain = [
        GpuProduct(gpu, DECODE_FIRST, *product, "float16", direction)
        for gpu, product, direction in itertools.product(PLAIN, PRODUCTS, DIRECTIONS)
    ]
    return fused + plain


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the last line: how many fused kernels compiled, and how many spilled."""
    fused = [r for r in records if r["implementation"] in FUSED]
    gpus = {r["gpu"] for r in fused}
    each = sum(r["error"] is None for r in fused) / max(1, len(gpus))
    spilled = sum("spilling" in (r["error"] or "") for r in fused)
    return f"{each:g} kernels x {len(gpus)} GPUs compiled, {spilled} spilled"


def check_kernels() -> tuple[list[str], list[dict[str, Any]], bool]:
    """Returns the lines to print, a record of each kernel, and whether all are right."""
    asked = cases()
    with counted("kernels", len(asked)) as advance:
        records = []
        for record in compile_all(asked):
            records.append(record)
            advance()
    failed = [record for record in records if record["error"]]
    line = "{gpu}, {implementation}, {rows} rows, {k}x{n}, {dtype}, {direction}: {error}"
    for record in failed:
        print(line.format(**record), file=sys.stderr)
    lines = []
    for gpu in PLAIN:
        kept = [r for r in records if r["gpu"] == gpu and not r["error"]]
        lines.append(f"{gpu}: {len(kept)} products of float16 without a product of float32")
    compiled = any(r["implementation"] in FUSED and not r["error"] for r in records)
    return [*lines, summary(records)], records, compiled and not failed


def check_programs() -> tuple[list[str], list[dict[str, Any]], bool]:
    """Returns lines to print, a record of each program of `bench gpu`, and whether all compiled."""
    asked = list(compile_check.tasks())
    with counted("programs of bench gpu", sum(len(task.names) for task in asked)) as advance:
        outcomes = compile_check.compile_all(asked, lambda outcome: advance())
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(outcome, file=sys.stderr)
    lines = [*compile_check.table(outcomes), compile_check.summary(outcomes)]
    return lines, [outcome._asdict() for outcome in outcomes], bool(outcomes) and not failed


CHECKS = {"kernels": check_kernels, "programs": check_programs}


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print records instead of lines")
    parser.add_argument("--only", choices=CHECKS, help="check only these")
    options = parser.parse_args()
    done = {name: check() for name, check in CHECKS.items() if options.only in (None, name)}
    if options.json:
        print(json.dumps({name: records for name, (_, records, _) in done.items()}, indent=1))
    else:
        print("\n".join(line for lines, _, _ in done.values() for line in lines))
    return 0 if all(right for _, _, right in done.values()) else 1


if __name__ == "__main__":
    program.run(main)
