"""The command `qlora-jax combine`."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.commands import time_notice
from qlora_jax.commands.common import count, say, show
from qlora_jax.runtime.errors import UserError

TEXT = "Write a weighted sum of adapters as one new adapter."

EPILOG = """The sum is exact; its rank is the sum of the ranks. --rank replaces it by the nearest
adapter of a lower rank (from the singular values), and prints the error of that. A negative weight
subtracts an adapter."""

NEGATIVE = re.compile(r"-[\d.]")
"""Pattern of a value that begins with a minus sign; without it, argparse would take the value in
`--adapter -0.5=DIR` for an option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `combine` to its parser."""
    parser.epilog = EPILOG
    parser._negative_number_matcher = NEGATIVE
    parser.add_argument("out", metavar="OUT", help="folder to write, in PEFT's format")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=_weighted,
        metavar="WEIGHT=DIR",
        help="a folder in PEFT's format or a run directory; may be repeated",
    )
    parser.add_argument(
        "--rank", type=count, metavar="R", help="largest rank of a linear in the result"
    )


def _weighted(text: str) -> tuple[float, str]:
    weight, equals, folder = text.partition("=")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (equals and folder and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be WEIGHT=DIR, for example -0.5=DIR, not {text!r}")
    return value, folder


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Reads the adapters, adds them up, and writes the sum."""
    if not options.adapter:
        raise UserError("--adapter is missing; give --adapter WEIGHT=DIR")
    from qlora_jax.formats import peft
    from qlora_jax.formats.peft.plain import adapter_folder, plain
    from qlora_jax.lora.arithmetic import combine, truncate
    from qlora_jax.lora.weights import largest_rank

    folders = [adapter_folder(path) for _, path in options.adapter]
    stored = [peft.read_adapter(folder) for folder in folders]
    terms = []
    shapes: dict[str, tuple[int, int]] = {}
    for (weight, _), folder, read in zip(options.adapter, folders, stored):
        adapters = plain(folder, read)
        for path, own in adapters.items():
            if shapes.setdefault(path, own.shape) != own.shape:
                raise UserError(
                    f"{folder}: {path} is {list(own.shape)} (in, out), but {list(shapes[path])} in "
                    "an earlier adapter; leave out the adapter that is for another model"
                )
        terms.append((weight, adapters))
    bases = list(dict.fromkeys(read.base_name for read in stored))
    if len(bases) > 1:
        say(f"warning: the adapters name different base models: {', '.join(map(repr, bases))}")
    total, error = combine(terms), 0.0
    if options.rank is not None:
        time_notice.tell_expected_time("combine", linears=len(total))
        shorter = truncate(total, options.rank)
        total, error = shorter.adapters, shorter.error
        where, most = shorter.worst
        say(f"truncated to rank {options.rank}: relative error {error:.3g}; {most:.3g} in {where}")
    peft.write_adapter(
        Path(options.out),
        total,
        base_name=bases[0],
        scaling="constant",
    )
    if options.json:
        print(json.dumps({"folder": options.out, "rank": largest_rank(total), "error": error}))
        return
    show(f"{options.out}: {len(total)} linears, rank {largest_rank(total)}")
