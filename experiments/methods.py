"""QLoRA, 16-bit LoRA and full fine-tuning on the same data, seed and schedule, in one table.

Question: does training adapters on a 4-bit base reach what 16 bits and full fine-tuning reach
  (QLoRA, section 4; LoRA, section 5)?
Expected: the three held-out losses lie close together; each method is given one learning rate, so
  this is a look, not a tuned comparison.
Cost: three runs of 200 steps of 2 x 256 tokens of SmolLM2-135M: about 25 minutes on 2 CPU cores.
Command: python experiments/methods.py --out runs/methods
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from qlora_jax.train.metrics import read_metrics

RATES = {"qlora": 5e-4, "lora": 5e-4, "full": 5e-5}
COLUMNS = (
    "method",
    "loss at step 1",
    "last 20 steps",
    "held out before",
    "after",
    "s per step",
    "trainable",
)


def run(config: str, out: Path, method: str, overrides: list[str]) -> None:
    """Trains one method as a process of its own, so that memory and compilation are not shared."""
    command = [
        *(sys.executable, "-m", "qlora_jax", "train", config, "--overwrite"),
        *(f"--method={method}", f"--output={out / method}"),
        *(f"--optimizer.learning_rate={RATES[method]}", "--train.samples=0", *overrides),
    ]
    subprocess.run(command, check=True)


def row(folder: Path) -> dict[str, object]:
    """One line of the table, read from a run's own files."""
    metrics = read_metrics(folder / "metrics.jsonl")
    losses = [m["train/loss"] for m in metrics if "train/loss" in m]
    held_out = [m["eval/loss"] for m in metrics if "eval/loss" in m]
    seconds = [m["train/seconds"] for m in metrics if "train/seconds" in m]
    results = json.loads((folder / "manifest.json").read_text())["results"]
    values = (
        folder.name,
        round(losses[0], 4),
        round(statistics.fmean(losses[-20:]), 4),
        round(held_out[0], 4),
        round(held_out[-1], 4),
        round(statistics.median(seconds), 3),
        results["trainable"],
    )
    return dict(zip(COLUMNS, values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--steps", type=int, default=200)
    options, overrides = parser.parse_known_args()
    for method in RATES:
        run(options.config, options.out, method, [f"--train.steps={options.steps}", *overrides])
    rows = [row(options.out / method) for method in RATES]
    table = [COLUMNS, ["---"] * len(COLUMNS), *(r.values() for r in rows)]
    text = "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in table)
    (options.out / "methods.md").write_text(text + "\n")
    (options.out / "methods.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
