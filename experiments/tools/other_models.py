"""Quantizes, adapts and trains models of other packages without a change to their code.

Question: do the library's calls work on models that were not written for it?
Expected: fresh adapters change no output; 4-bit weights give the outputs of the decoded weights,
  and adapters those of the merged weights, up to the rounding of float32; training lowers the loss.
Cost: some minutes on 2 CPU cores; no GPU. Needs the environment of `make test-models`.
Command: python -m experiments.tools.other_models [--only PART] [--write PAGE] [--json FILE]
  The table replaces the text of the page between the comments named other models.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from experiments.other_models import measure
from experiments.other_models.cases import Case
from experiments.other_models.every import CASES, installed
from experiments.tools import pages, program
from qlora_jax.quant import QTensor
from qlora_jax.runtime.atomic import write_text

MARKS = pages.Marks("<!-- begin other models -->", "<!-- end other models -->")
HEAD = (
    "| model | parameters | in 4 bits | their bytes | fresh adapters | decoded | merged | loss |\n"
    "|---|---|---|---|---|---|---|---|"
)


class Row(NamedTuple):
    """Figures of one model; differences are relative to the largest output.

    Attributes:
      model: name of the package and of the model.
      parameters: number of all parameters.
      quantized: number of the parameters that are in 4 bits.
      bytes: bytes of the parameters that are in 4 bits.
      fresh: difference that fresh adapters make.
      decoded: difference between 4-bit and decoded weights.
      merged: difference between adapters and merged weights.
      before: loss before training.
      after: loss after 20 steps of Adam.
    """

    model: str
    parameters: int
    quantized: int
    bytes: int
    fresh: float
    decoded: float
    merged: float
    before: float
    after: float


def row(case: Case) -> Row:
    """Quantizes, adapts and trains one case; returns its row."""
    way = measure.way_of(case)
    parameters = sum(np.size(x) for x in way.weights(way.build(case, 0)).values())
    model = way.quantize(case, way.build(case, 0))
    held = [q for q in way.weights(model).values() if isinstance(q, QTensor)]
    ours = measure.outputs(case, model)
    decoded = measure.difference(ours, measure.outputs(case, way.merge(case, model)))
    model = way.adapt(case, model)
    fresh = measure.difference(measure.outputs(case, model), ours)
    told = measure.losses(case, model)
    trained, frozen, join = way.split(model)
    model = join(measure.nudged(trained), frozen)
    ours = measure.outputs(case, model)
    merged = measure.difference(ours, measure.outputs(case, way.merge(case, model)))
    quantized = sum(math.prod(q.shape) for q in held)
    stored = sum(q.nbytes for q in held)
    return Row(case.name, parameters, quantized, stored, fresh, decoded, merged, told[0], told[-1])


def line(row: Row) -> str:
    """Formats a row of the table."""
    cells = (
        row.model,
        f"{row.parameters:,}",
        f"{row.quantized:,}",
        f"{row.bytes:,} ({8 * row.bytes / row.quantized:.2f} bits)",
        *(f"{x:.0e}" if x else "0" for x in (row.fresh, row.decoded, row.merged)),
        f"{row.before:.2f} to {row.after:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--only", default="", help="run only models whose names contain this text")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    print(HEAD, flush=True)
    for case in CASES:
        if options.only not in case.name:
            continue
        if not installed(case):
            print(f"{case.name}: {case.module} is not installed", flush=True)
            continue
        rows.append(row(case))
        print(line(rows[-1]), flush=True)
    if options.json:
        write_text(options.json, json.dumps([r._asdict() for r in rows], indent=2) + "\n")
    if options.write:
        pages.write(options.write, MARKS, "\n".join([HEAD, *map(line, rows)]))
    return 0


if __name__ == "__main__":
    program.run(main)
