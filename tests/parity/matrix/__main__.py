"""Prints the outcome of every case: `make matrix`."""

import argparse
import os
import sys
import warnings
from pathlib import Path

# Each program runs once, so a low optimization level saves compile time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
)

from matrix import every, models, report
from matrix.judge import WRONG


def main(arguments: list[str]) -> int:
    """Runs the chosen groups, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="parts of groups' names; left out: all")
    parser.add_argument("--alone", action="store_true", help="each choice alone over the usual")
    parser.add_argument("--times", type=int, default=1, help="as many pairwise cases as usual")
    parser.add_argument("--seed", type=int, default=every.SEED, help="of sample and weights")
    parser.add_argument("--json", type=Path, help="a file to write every outcome to")
    parser.add_argument("--verbose", action="store_true", help="every case as it ends")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    models.quiet()
    if options.alone:
        groups = every.one_by_one(options.seed)
    else:
        groups = every.sampled(options.seed, options.times)
    outcomes = []
    for name, run in groups.items():
        if options.only is None or any(part in name for part in options.only):
            for outcome in run():
                outcomes.append(outcome)
                if options.verbose:
                    print(report.describe(outcome), flush=True)
    print(report.table(outcomes))
    if options.json:
        options.json.write_text(report.as_json(outcomes), encoding="utf-8")
    return any(o.verdict == WRONG for o in outcomes)


sys.exit(main(sys.argv[1:]))
