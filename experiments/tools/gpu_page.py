"""Writes the reports of GPUs into docs/gpu.md.

Expected: a section for each docs/results/gpu/DEVICE.json, in the order of the names, with its
  targets; without any report, the targets marked as not measured.
Cost: none.
Command: make gpu-report (on a GPU), or python -m experiments.tools.gpu_page --write docs/gpu.md
"""

import json
from pathlib import Path

from experiments.tools import pages, program
from qlora_jax.bench.gpu import page
from qlora_jax.bench.gpu.report import Report

REPORTS = Path("docs/results/gpu")
MARKS = pages.Marks("<!-- gpu_page.py begins -->", "<!-- gpu_page.py ends -->")
NOTHING: Report = {"checks": [], "figures": []}


def section(reports: Path) -> str:
    """Returns the text for all reports in a folder; the folder may be missing."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(reports.glob("*.json"))]
    if not found:
        return "No report from a GPU is here yet.\n\n" + page.target_table(NOTHING)
    return "\n".join(page.text(report) for report in found).rstrip()


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--write", type=Path, help="page with the two markers; default: print")
    parser.add_argument("--reports", type=Path, default=REPORTS, help=f"default {REPORTS}")
    options = parser.parse_args()
    text = section(options.reports)
    if options.write:
        pages.write(options.write, MARKS, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    program.run(main)
