"""What the papers promise of memory, as the compilers of the GPUs see it.

Question: do 7B fit into a T4 and 65B under 48 GB, and what is it that takes the memory?
Expected: every case of the table in docs/memory.md fits, below its target.
Cost: about 6 minutes on 2 CPU cores and 2 GB of RAM; no GPU. Needs the extra `gpu-check`.
Command: python -m experiments.tools.memory_table [--write docs/memory.md] [--json docs/memory.json]
  The table replaces what stands in the page between the two comments named plans.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tools import pages, program
from qlora_jax.commands import plan as command
from qlora_jax.gpu.described import read_gpu
from qlora_jax.models.shapes import find
from qlora_jax.plan import contrast
from qlora_jax.plan.plan import planned
from qlora_jax.runtime import gpu_memory
from qlora_jax.runtime.atomic import write_text

GIB = 2**30
MARKS = pages.Marks("<!-- begin plans -->", "<!-- end plans -->")


class Case(NamedTuple):
    """A run and what is said about it: by the article or the paper, and our own target, in GiB."""

    model: str
    gpu: str
    sequence: int
    said: str
    target: float
    adapters: str = "float32"


CASES = (
    Case("llama-7b", "t4", 512, "13.5 GB (article), 6.9 GB (paper)", 5.8),
    Case("llama-7b", "t4", 2048, "", 7.0),
    Case("llama-13b", "t4", 512, "11.3 GB (paper)", 10.5),
    Case("llama-33b", "rtx4090", 512, "24.7 GB (paper): over 24 GB", 22.0),
    Case("llama-65b", "a6000", 512, "45.0 GB (paper), under 48 GB (article)", 40.0),
    Case("llama-65b", "a6000", 512, "", 38.0, "bfloat16"),
    Case("llama-65b", "a100", 2048, "", 44.0),
    Case("llama2-70b", "a100", 8192, "", 58.0),
)


def measure(case: Case) -> dict[str, Any]:
    """The plan of a case, moments on the host, with its own cost."""
    settings = {
        "lora.rank": "64",
        "data.sequence_length": str(case.sequence),
        "lora.dtype": case.adapters,
        "optimizer.offload": "host",
    }
    config = command.suited(command.of_model(case.model, settings), read_gpu(case.gpu).capability)
    start = time.perf_counter()
    answer = planned(config, find(case.model), case.gpu, lambda line: None, False)
    seconds = time.perf_counter() - start
    plan = answer["plan"]
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        **case._asdict(),
        "device_gib": plan.device / GIB,
        "host_gib": plan.host / GIB,
        "limit_gib": gpu_memory.usable(read_gpu(case.gpu).memory) / GIB,
        "programs": [{**p._asdict(), "device": p.device} for p in plan.programs],
        "seconds": seconds,
        "peak_ram_gib_so_far": children / GIB,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model, tokens, adapters | GPU | said | target, GiB | device, GiB | of it arguments "
        "| gradients | temporaries | host, GiB | may use, GiB | plan took, s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        worst = max(row["programs"], key=lambda p: p["device"])
        figures = (worst["arguments"], worst["outputs"] - worst["alias"], worst["temp"])
        parts = " | ".join(f"{x / GIB:.2f}" for x in figures)
        met = "" if row["device_gib"] <= row["target"] else " (missed)"
        lines.append(
            f"| {row['model']}, {row['sequence']}, {row['adapters']} | {row['gpu']} | {row['said']}"
            f" | {row['target']:.1f} | {row['device_gib']:.2f}{met} | {parts}"
            f" | {row['host_gib']:.2f} | {row['limit_gib']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    for i, case in enumerate(CASES):
        print(f"{i + 1} of {len(CASES)}: {case.model} on {case.gpu}", file=sys.stderr, flush=True)
        rows.append(measure(case))
    print(table(rows))
    print("\n" + "\n".join(map(str, contrast.lines())))
    if options.json:
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    if options.write:
        pages.write(options.write, MARKS, table(rows))
    return 0 if all(row["device_gib"] <= row["target"] for row in rows) else 1


if __name__ == "__main__":
    program.run(main)
