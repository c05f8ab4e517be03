"""Do the kernels compile for GPUs that are not here, without spilling a register?

Expected: every implementation of `qlora_jax/kernels/fused.py`, in each of its dtypes, for every GPU
  it runs on: no spill, no more shared memory than there is, no buffer of the weight in floats. On a
  T4, which has no such kernel, products of float16 stay float16.
Cost: a few minutes on 2 CPU cores; no GPU, no driver. Needs the extra `gpu-check`.
Command: make gpu-check
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.kernels.fused import FUSED, usable
from qlora_jax.memory.compile import GPUS, read_gpu
from qlora_jax.memory.product import DECODE_FIRST, DIRECTIONS, Case, compile_all

PRODUCTS = ((1, 4096, 4096), (32, 4096, 4096), (512, 4096, 4096), (512, 4096, 11008))
"""Rows, K and N: registers that suffice for one shape need not for another."""

PLAIN = tuple(gpu for gpu in GPUS if not usable(read_gpu(gpu).capability, "float16"))
"""GPUs without a fused kernel."""


def cases() -> list[Case]:
    """Every kernel for every GPU, and decoding first for the GPUs that have none."""
    fused = [
        Case(gpu, name, *product, dtype, direction)
        for gpu, name in itertools.product(GPUS, FUSED)
        for product, dtype, direction in itertools.product(PRODUCTS, FUSED[name].dtypes, DIRECTIONS)
        if name in usable(read_gpu(gpu).capability, dtype)
    ]
    plain = [
        Case(gpu, DECODE_FIRST, *product, "float16", direction)
        for gpu, product, direction in itertools.product(PLAIN, PRODUCTS, DIRECTIONS)
    ]
    return fused + plain


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """The last line: what compiled, of the fused kernels alone."""
    fused = [r for r in records if r["implementation"] in FUSED]
    gpus = {r["gpu"] for r in fused}
    each = sum(r["error"] is None for r in fused) / max(1, len(gpus))
    spilled = sum("spilling" in (r["error"] or "") for r in fused)
    return f"{each:g} kernels x {len(gpus)} GPUs compiled, {spilled} spilled"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    records = list(compile_all(cases()))
    failed = [record for record in records if record["error"]]
    line = "{gpu}, {implementation}, {rows} rows, {k}x{n}, {dtype}, {direction}: {error}"
    for record in failed:
        print(line.format(**record), file=sys.stderr)
    if options.json:
        print(json.dumps(records, indent=1))
    else:
        for gpu in PLAIN:
            kept = [r for r in records if r["gpu"] == gpu and not r["error"]]
            print(f"{gpu}: {len(kept)} products of float16 without a product of float32")
        print(summary(records))
    compiled = any(r["implementation"] in FUSED and not r["error"] for r in records)
    return 0 if compiled and not failed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
