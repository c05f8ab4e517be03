"""Compares the memory claims of the papers with programs that are compiled for the GPUs.

Question: do 7B parameters fit into a T4 and 65B under 48 GB, and what takes the memory?
Expected: every case of the table in docs/memory.md fits, below its target.
Cost: about 6 minutes on 2 CPU cores and 2 GB of RAM; no GPU. Needs the extra `gpu-check`.
Command: python -m experiments.tools.memory_table [--write docs/memory.md] [--json docs/memory.json]
  The tables replace the text of the page between the comments named plans and contexts.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tools import pages, program
from qlora_jax import config as configs
from qlora_jax.commands import plan as command
from qlora_jax.gpu.described import read_gpu
from qlora_jax.models.shapes import find
from qlora_jax.plan import paper_claims
from qlora_jax.plan.ledger import ledger, total
from qlora_jax.plan.plan import planned
from qlora_jax.runtime import gpu_memory
from qlora_jax.runtime.atomic import write_text

GIB = 2**30
MARKS = pages.Marks("<!-- begin plans -->", "<!-- end plans -->")
CONTEXT_MARKS = pages.Marks("<!-- begin contexts -->", "<!-- end contexts -->")


class Case(NamedTuple):
    """A run, the claim of the article or the paper about it, and our own target in GiB.

    With `at_once`, gradients are not clipped and each layer is updated in the backward pass.
    Otherwise gradients are clipped, and those of `micro_batches` micro-batches are summed.
    """

    model: str
    gpu: str
    sequence: int
    said: str
    target: float
    adapters: str = "float32"
    at_once: bool = False
    micro_batches: int = 1


class Context(NamedTuple):
    """A model at rank 32 on a GPU: Unsloth's longest sequence and our target, in tokens."""

    model: str
    gpu: str
    said: int
    target: int


CASES = (
    Case("llama-7b", "t4", 512, "13.5 GB (article), 6.9 GB (paper)", 5.8),
    Case("llama-7b", "t4", 2048, "", 7.0),
    Case("llama-13b", "t4", 512, "11.3 GB (paper)", 10.5),
    Case("llama-13b", "a6000", 512, "11.3 GB (paper)", 8.8, at_once=True),
    Case("llama-33b", "rtx4090", 512, "24.7 GB (paper): over 24 GB", 22.0),
    Case("llama-65b", "a6000", 512, "45.0 GB (paper), under 48 GB (article)", 40.0),
    Case("llama-65b", "a6000", 512, "", 37.0, at_once=True),
    Case("llama-65b", "a6000", 512, "", 39.9, micro_batches=4),
    Case("llama-65b", "a6000", 512, "", 38.0, "bfloat16"),
    Case("llama-65b", "a100", 2048, "", 44.0),
    Case("llama2-70b", "a100", 8192, "", 58.0),
)


CONTEXTS = (
    Context("llama3-8b", "rtx4090", 78_475, 80_000),
    Context("llama3-8b", "h100", 342_733, 350_000),
    Context("llama3-70b", "a6000", 12_106, 13_000),
    Context("llama3-70b", "h100", 89_389, 90_000),
)

HOST = {"optimizer.offload": "host", "model.remat": "host"}


def longest(context: Context) -> dict[str, Any]:
    """Finds the longest sequence that fits, without clipping.

    Moments and the layers' inputs are in host memory.
    """
    settings = {"lora.rank": "32", "optimizer.clip_norm": "0", **HOST}
    config, model = command.of_model(context.model, settings), find(context.model)
    start = time.perf_counter()
    answer = planned(config, model, context.gpu, _say, ["sequence"], command.BEYOND)
    found = answer["largest_sequence"]
    at_it = configs.changed(config, {"data.sequence_length": str(found)})
    return {
        **context._asdict(),
        "largest_sequence": found,
        "host_gib": total(ledger(model, at_it), "host") / GIB,
        "seconds": time.perf_counter() - start,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def contexts_table(rows: list[dict[str, Any]]) -> str:
    """Formats the longest sequences as Markdown."""
    lines = [
        "| model, rank 32, one row | GPU | Unsloth says, tokens | target | longest, tokens "
        "| host memory for it, GiB | plan took, s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        met = "" if row["largest_sequence"] >= row["target"] else " (missed)"
        lines.append(
            f"| {row['model']} | {row['gpu']} | {row['said']:,} | {row['target']:,}"
            f" | {row['largest_sequence']:,}{met} | {row['host_gib']:.0f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def measure(case: Case) -> dict[str, Any]:
    """Plans a case; returns the plan's figures, and the seconds and memory of planning.

    Moments and the layers' inputs are in host memory.
    """
    settings = {
        "lora.rank": "64",
        "data.sequence_length": str(case.sequence),
        "lora.dtype": case.adapters,
        "optimizer.clip_norm": "0" if case.at_once else "1",
        "train.gradient_accumulation": str(case.micro_batches),
        **HOST,
    }
    config = command.suited(command.of_model(case.model, settings), read_gpu(case.gpu).capability)
    start = time.perf_counter()
    answer = planned(config, find(case.model), case.gpu, lambda line: None, [])
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
    """Formats the rows as Markdown."""
    lines = [
        "| model, tokens, adapters | updates | GPU | said | target, GiB | device, GiB "
        "| of it arguments | gradients | temporaries | host, GiB | may use, GiB | plan took, s |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        summed = f"{row['micro_batches']} micro-batches, " if row["micro_batches"] > 1 else ""
        updates = "at once" if row["at_once"] else f"{summed}clipped"
        worst = max(row["programs"], key=lambda p: p["device"])
        figures = (worst["arguments"], worst["outputs"] - worst["alias"], worst["temp"])
        parts = " | ".join(f"{x / GIB:.2f}" for x in figures)
        met = "" if row["device_gib"] <= row["target"] else " (missed)"
        lines.append(
            f"| {row['model']}, {row['sequence']}, {row['adapters']} | {updates} | {row['gpu']}"
            f" | {row['said']}"
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
    contexts = [longest(context) for context in CONTEXTS]
    print("\n" + contexts_table(contexts))
    print("\n" + "\n".join(map(str, paper_claims.paper_claims())))
    if options.json:
        write_text(options.json, json.dumps({"runs": rows, "contexts": contexts}, indent=1) + "\n")
    if options.write:
        pages.write(options.write, MARKS, table(rows))
        pages.write(options.write, CONTEXT_MARKS, contexts_table(contexts))
    met = [row["device_gib"] <= row["target"] for row in rows]
    met += [row["largest_sequence"] >= row["target"] for row in contexts]
    return 0 if all(met) else 1


if __name__ == "__main__":
    program.run(main)
