"""The command `qlora-jax report`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

TEXT = "Gather the results of sweeps into one HTML page."
RESULTS = Path("runs") / "sweeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `report` to its parser."""
    parser.add_argument(
        "results",
        nargs="?",
        type=Path,
        default=RESULTS,
        metavar="RESULTS",
        help=f"folder that contains sweeps; default {RESULTS}",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write; default RESULTS/report.html"
    )


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Writes the page and prints its path."""
    from qlora_jax.sweep.report import report

    page = options.out or options.results / "report.html"
    count = report(options.results, page, command)
    print(json.dumps({"page": str(page), "sweeps": count}) if options.json else str(page))
