"""Tests whether QLoRA reaches the loss of 16-bit LoRA, and how far both are from full fine-tuning.

qlora-jax sweep parity
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Column, Metric, columns, interval, lines, measured
from qlora_jax.sweep.statistics import Interval, difference, mean, within

RATES = [0.5, 1.0, 2.0, 4.0]
"""Factors that multiply the learning rates of `inputs`."""

ARMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "optimizer.learning_rate": inputs.FULL_RATE},
    "lora 16 bits": {"method": "lora", "optimizer.learning_rate": inputs.LOW_RANK_RATE},
    "qlora nf4 + dq": {"method": "qlora", "optimizer.learning_rate": inputs.LOW_RANK_RATE},
    "qlora nf4": {
        "method": "qlora",
        "optimizer.learning_rate": inputs.LOW_RANK_RATE,
        "quant.double_quant": False,
    },
    "qlora fp4": {
        "method": "qlora",
        "optimizer.learning_rate": inputs.LOW_RANK_RATE,
        "quant.codebook": "fp4_bnb",
        "quant.double_quant": False,
    },
}
REFERENCE, CLAIMED = "lora 16 bits", "qlora nf4 + dq"
ALIKE = 0.03
"""Largest difference in loss that counts as a match, in nats per token: 3% of perplexity."""

ANSWERS = 24

METRICS: Mapping[str, Metric[Path]] = {
    "rouge_l": Metric(lambda run: cells.rouge_of(run, ANSWERS), "ROUGE-L of answers [95%]"),
}
"""Figures of a finished run, from its folder, in addition to those of `cells.finetuned`."""


def run(cell: Cell, context: Context) -> Rows:
    arm = ARMS[cell["arm"]]
    rate = arm["optimizer.learning_rate"] * cell["rate"]
    settings = {**arm, "optimizer.learning_rate": rate, "train.seed": cell["seed"]}
    found = cells.finetuned(cell["config"], context.folder, settings)
    return {**found, **measured(METRICS, context.folder / cells.RUN)}


def analyse(table: Table) -> Analysis:
    tuned = Table([row for arm in ARMS for row in _best(table.where(arm=arm)).rows])
    gaps = {arm: _gap(tuned, "loss", arm, REFERENCE) for arm in ARMS if arm != REFERENCE}
    claimed = gaps[CLAIMED]
    shown: dict[str, Column] = {
        "rate": lambda own: _rate(own.rows[0]["rate"], table.values("rate")),
        "trained share": lambda own: f"{own.rows[0]['share']:.2%}",
        "held-out loss [95%]": interval("loss"),
        f"above {REFERENCE} [95%]": lambda own: str(gaps.get(own.rows[0]["arm"], "")),
        **columns(METRICS),
    }
    full = _gap(tuned, "loss", CLAIMED, "full")
    return Analysis(
        Verdict(
            f"held-out loss of {CLAIMED} less that of {REFERENCE}: {claimed}; less that of full "
            f"fine-tuning: {full}; fp4 less {REFERENCE}: {gaps['qlora fp4']}",
            claimed,
            within(claimed, high=ALIKE),
        ),
        {
            "At each arm's best learning rate": markdown(lines(tuned, ["arm"], shown)),
            "All rates: held-out loss": markdown(
                lines(table, ["arm", "rate"], {"loss": interval("loss")})
            ),
        },
        {"parity": _picture(tuned)},
    )


def _best(arm: Table) -> Table:
    """Returns the rows of the learning rate with the lowest mean loss."""
    by_rate = arm.groups("rate").values()
    return min(by_rate, key=lambda own: mean(own.column("loss")).mean)


def _rate(best: float, tried: list[float]) -> str:
    edge = best in (min(tried), max(tried))
    return f"{best:g} (the last that was tried)" if edge else f"{best:g}"


def _gap(tuned: Table, figure: str, arm: str, other: str) -> Interval:
    return difference(*tuned.paired(figure, "arm", arm, other, ["config", "seed"]))


def _picture(tuned: Table) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for ax, (name, title) in zip(
        figure.subplots(1, 2),
        [("loss", "held-out loss, nats per token"), ("rouge_l", "ROUGE-L of generated answers")],
    ):
        for i, arm in enumerate(ARMS):
            values = tuned.where(arm=arm).column(name)
            found = mean(values)
            ax.errorbar(i, found.mean, found.high - found.mean, fmt="s", capsize=4)
            ax.plot([i] * len(values), values, "k.", alpha=0.5)
        ax.set_xticks(range(len(ARMS)), [a.replace(" ", "\n", 1) for a in ARMS])
        ax.set_title(title)
    return figure


EXPERIMENT = Experiment(
    name="parity",
    question="Does QLoRA with NF4 reach 16-bit LoRA, and how far is full fine-tuning?",
    paper="QLoRA Table 3: Super-NaturalInstructions RougeL at 780M: BF16 48.0, LoRA BF16 47.1, "
    "FP4 47.5, NF4 with DQ 47.7; Table 4: mean MMLU BF16 53.0, Float4 52.2, NF4 with DQ 53.1",
    expected="nf4 with double quantization within noise of 16-bit LoRA; fp4 a little behind",
    cost="2 CPU cores, 2 GiB",
    axes={"config": [inputs.CONFIG], "arm": list(ARMS), "rate": RATES},
    inputs=inputs.made,
    estimate=costs.by(
        "arm",
        {"full": 19, "lora 16 bits": 12, "qlora nf4 + dq": 15, "qlora nf4": 12, "qlora fp4": 10},
        2,
    ),
    run=run,
    analyse=analyse,
)
