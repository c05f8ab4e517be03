"""Tries to break the program: kills, damaged files, full disks, foreign input, hostile clients.

Question: does any fault end in a traceback, a hang, too much memory, or a wrong result that no
  message reports?
Expected: no; after every fault the result equals that of an undisturbed run, or one line names the
  cause.
Cost: hours on 2 CPU cores for all parts; fuzz takes 4 minutes and clients takes 25.
Command: python -m experiments.faults [--parts fuzz,kills] [--seed 0] [--scale 1] [--out OUT.json]
  Prints each fault when it is found, and a table at the end; exit code 1 if there was a fault.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

from experiments.faults.common import Campaign, Row, make_seeds, share_compiled, table

PARTS = ("fuzz", "commands", "damage", "kills", "disks", "signals", "environments", "clients")
"""Modules of this folder; each has `run(campaign)`, which yields rows."""
SHOWN = 20
"""Number of faults of a row that are printed; `--out` holds all faults."""


def main() -> int:
    """Runs the parts and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the whole campaign")
    parser.add_argument("--folder", type=Path, help="folder to work in; it is kept")
    parser.add_argument("--out", type=Path, help=".json file to write: the rows and every fault")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)

    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
        )
        campaign = Campaign(folder=folder, seed=options.seed, scale=options.scale, say=say)
        share_compiled(campaign)
        make_seeds(campaign)
        for part in parts:
            for row in importlib.import_module(f"experiments.faults.{part}").run(campaign):
                rows.append(row)
                say(f"{row.part}: {row.what}: {row.tried} tried, {len(row.faults)} faults")
                for fault in row.faults[:SHOWN]:
                    say(f"  {fault}")
    print(table(rows))
    if options.out:
        options.out.write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n",
            encoding="utf-8",
        )
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
