"""Compares QLoRA of tunix's Gemma 3 by this library and by qwix, on the same weights.

Question: how do code size, memory, time and error compare, and which uses does each side support?
Expected: nearly the same errors, because the NF4 blocks are the same; double quantization stores
  fewer bits; A, B and the scales take fewer bytes in qwix, which keeps them in the model's dtype.
Cost: six minutes on 2 CPU cores. Needs the environment of `make test-models`.
Command: python -m experiments.benchmarks.beside_qwix [--shape small] [--dtype bfloat16]
  [--write PAGE] [--json]
  The tables replace the text of the page between the comments named qwix.
"""

import argparse
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from experiments.benchmarks import qwix_trials
from experiments.benchmarks.qwix_measure import ROWS, Figures, compare
from experiments.benchmarks.qwix_sides import ALPHA, BLOCK, RANK, SHAPES
from experiments.tools import pages, program
from qlora_jax.runtime.device import describe_devices
from qlora_jax.runtime.errors import UserError

MARKS = pages.Marks("<!-- begin qwix -->", "<!-- end qwix -->")


def _bytes(f: Figures, count: int) -> str:
    return f"{count:,} ({8 * count / f.quantized:.2f} bits)"


LINES: dict[str, Callable[[Figures], str]] = {
    "lines of the user's code": lambda f: f"{f.code[0]} ({f.code[1]} statements)",
    "weights in 4 bits": lambda f: f"{f.quantized:,}",
    "their bytes by `.nbytes` (a byte for a `uint4`)": lambda f: _bytes(f, f.nbytes),
    "their bytes on the device": lambda f: _bytes(f, f.device),
    "their bytes, 4 bits packed": lambda f: _bytes(f, f.packed),
    "A and B": lambda f: f"{f.trained:,} {f.trained_dtype}",
    "bytes of these and of Adam's moments": lambda f: f"{f.trained_bytes:,}",
    "argument bytes of the compiled step": lambda f: f"{f.arguments:,}",
    "temporary bytes of the compiled step": lambda f: f"{f.temporaries:,}",
    "a step, ms": lambda f: f"{1000 * f.step:.1f}",
    "a forward pass, ms": lambda f: f"{1000 * f.forward:.1f}",
    "error of the weights": lambda f: f"{f.weights:.4f}",
    "error of the logits": lambda f: f"{f.logits:.4f}",
    "loss of the first and the last step": lambda f: f"{f.before:.3f}, {f.after:.3f}",
}


def table(figures: dict[str, Figures]) -> str:
    """Formats the figures as a table with one column per side."""
    head = ["", *figures]
    rows = [[name, *map(shown, figures.values())] for name, shown in LINES.items()]
    return markdown([head, *rows])


def markdown(rows: list[list[str]]) -> str:
    """Formats rows as a Markdown table; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings, device and versions of the measurement."""
    versions = {name: importlib.metadata.version(name) for name in ("qwix", "google-tunix")}
    return {
        "shape": options.shape,
        "dtype": options.dtype,
        "rows": ROWS,
        "length": options.length,
        "rank": RANK,
        "alpha": ALPHA,
        "block": BLOCK,
        "device": str(describe_devices()),
        "jax": jax.__version__,
        **versions,
    }


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--length", type=int, default=64, metavar="N")
    parser.add_argument("--times", type=int, default=10, metavar="N")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    try:
        known = about(options)
    except importlib.metadata.PackageNotFoundError as e:
        raise UserError(f"{e.name} is not installed; run make test-models first") from None
    figures = compare(options.shape, options.dtype, options.length, options.times)
    tried = qwix_trials.tried()
    if options.json:
        sides = {name: own._asdict() for name, own in figures.items()}
        print(json.dumps({**known, "figures": sides, "tried": tried}))
    heads = [["tried on this model", "ours", "qwix"]]
    text = "\n\n".join(
        [
            ", ".join(f"{name} {value}" for name, value in known.items()),
            table(figures),
            markdown(heads + [list(row) for row in tried]),
        ]
    )
    if not options.json:
        print(text)
    if options.write:
        pages.write(options.write, MARKS, text)
    return 0


if __name__ == "__main__":
    program.run(main)
