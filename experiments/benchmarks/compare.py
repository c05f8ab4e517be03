"""Our figures beside the peer's, from runs that alternate.

Each run is a process of its own; one of ours, one of theirs, and again, so that a slow minute of
the machine falls on both. Ratios are ours / theirs, pair by pair, and so less noisy than figures.

Command: python experiments/benchmarks/compare.py {step,load} --peer PYTHON [--repeat 3] MODEL
    [options that both scripts take] [--ours-args="--remat dots"] [--peer-args=--no-prepare]
Expected: step: ours is at least level in tokens/s on jax 0.12; load: ours is quicker, in less than
  half the memory.
Cost: 2 x --repeat times one run, a minute each at SmolLM2-135M's shape on 2 CPU cores.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = {
    "step": ("tokens_per_s", "step_min_s", "peak_train_mib", "peak_mib", "load_s", "compile_s"),
    "load": ("load_s", "import_s", "peak_mib", "after_load_mib", "weights_mib"),
}
"""What is compared, of what each script reports."""


def run(python: str, script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """One run; its messages go to stderr, its report is the last line of its output."""
    command = [python, str(HERE / script), *arguments, "--json"]
    print(shlex.join(command), file=sys.stderr)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"exit code {result.returncode}: {shlex.join(command)}")
    return json.loads(result.stdout.splitlines()[-1])


def summarize(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], names: Sequence[str]) -> dict:
    """Per figure: both medians, every pair's ratio and the median ratio; None where not known."""
    summary = {}
    for name in names:
        ours, peer = ([report[name] for report in side] for side in zip(*pairs))
        if None in (*ours, *peer):
            continue
        ratios = [round(a / b, 3) if b else None for a, b in zip(ours, peer)]
        summary[name] = {
            "ours": statistics.median(ours),
            "peer": statistics.median(peer),
            "ratio": None if None in ratios else statistics.median(ratios),
            "ratios": ratios,
        }
    return summary


def table(summary: dict[str, dict[str, Any]], labels: tuple[str, str]) -> str:
    rows = [("median", *labels, "ratio", "pair by pair"), ("---",) * 5]
    for name, row in summary.items():
        pairs = "" if row["ratio"] is None else ", ".join(map(str, row["ratios"]))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        rows.append((name, f"{row['ours']:g}", f"{row['peer']:g}", ratio, pairs))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def label(report: dict[str, Any]) -> str:
    versions = report["versions"]
    package = "jax" if "jax" in versions else "bitsandbytes"
    return f"{report['tool']} ({package} {versions[package]})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=FIGURES)
    parser.add_argument("--ours", default=sys.executable, metavar="PYTHON", help="default: this")
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--ours-args", default="", metavar="ARGS", help="further, for ours alone")
    parser.add_argument("--peer-args", default="", metavar="ARGS", help="further, for theirs alone")
    parser.add_argument("--repeat", type=int, default=3, help="pairs of runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    options, shared = parser.parse_known_args()
    pairs = []
    for _ in range(options.repeat):
        ours = run(options.ours, f"{options.what}.py", [*shared, *shlex.split(options.ours_args)])
        peer = run(
            options.peer, f"peer_{options.what}.py", [*shared, *shlex.split(options.peer_args)]
        )
        pairs.append((ours, peer))
    summary = summarize(pairs, FIGURES[options.what])
    if options.json:
        print(json.dumps({"summary": summary, "runs": [list(pair) for pair in pairs]}))
        return
    ours, peer = pairs[0]
    print(table(summary, (label(ours), label(peer))))
    if "losses" in ours:
        print(f"\nfirst losses on the same tokens: {ours['losses'][0]}, {peer['losses'][0]}")
        busy = [max(pair[0]["others_cores"], pair[1]["others_cores"]) for pair in pairs]
        print(f"cores that other processes took, the worse run of each pair: {busy}")


if __name__ == "__main__":
    main()
