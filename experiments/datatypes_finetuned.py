"""Measures which 4-bit data type is best after QLoRA fine-tuning.

qlora-jax sweep datatypes_finetuned
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from experiments.datatypes import CODEBOOKS, FLOATS
from qlora_jax.sweep import (
    Analysis,
    Cell,
    Context,
    Experiment,
    Population,
    Rows,
    Table,
    Verdict,
    markdown,
)
from qlora_jax.sweep.metrics import average, columns, interval, line
from qlora_jax.sweep.statistics import difference, mean, within

PLAIN = "16 bits"

SHOWN = {
    "loss before": average("loss_before"),
    "loss after [95%]": interval("loss"),
    **columns(cells.MEMBER),
}
"""Columns of the table: the losses, and the figures of `cells.MEMBER` that have a title."""


def together(group: Sequence[Cell], context: Context) -> list[Rows]:
    first = group[0]
    settings: dict[str, Any] = {"method": "lora"}
    if first["codebook"] != PLAIN:
        settings = {
            "quant__codebook": first["codebook"],
            "quant__double_quant": first["double_quant"],
        }
    members = [{"train.seed": cell["seed"]} for cell in group]
    return cells.population(first["config"], members, context, **settings)


def run(cell: Cell, context: Context) -> Rows:
    return together([cell], context)[0]


def analyse(table: Table) -> Analysis:
    double = table.where(double_quant=True)
    gaps = {
        name: difference(*double.paired("loss", "codebook", name, "nf4", ["config", "seed"]))
        for name in FLOATS
    }
    least = min(gaps.values(), key=lambda interval: interval.low)
    rows = [
        {
            "codebook": codebook,
            "double quantization": "" if codebook == PLAIN else double_quant,
            **line(own, SHOWN),
        }
        for (codebook, double_quant), own in table.groups("codebook", "double_quant").items()
    ]
    ours = ", ".join(f"{name} - nf4: {gap}" for name, gap in gaps.items())
    return Analysis(
        Verdict(f"held-out loss above nf4's after fine-tuning: {ours}", least, within(least, 0.0)),
        {"Held-out loss before and after fine-tuning, nats per token": markdown(rows)},
        {"datatypes_finetuned": _picture(table)},
    )


def _picture(table: Table) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    plain = mean(table.where(codebook=PLAIN).column("loss"))
    axes.axhline(plain.mean, color="gray", label="16-bit LoRA")
    axes.axhspan(plain.low, plain.high, color="gray", alpha=0.2)
    for shift, (dq, label) in enumerate([(False, "plain scales"), (True, "double quantization")]):
        own = [table.where(codebook=c, double_quant=dq) for c in CODEBOOKS]
        found = [mean(part.column("loss")) for part in own if len(part)]
        x = [i + 0.2 * shift - 0.1 for i, part in enumerate(own) if len(part)]
        half = [f.high - f.mean for f in found]
        axes.errorbar(x, [f.mean for f in found], half, fmt="o", capsize=3, label=label)
    axes.set_xticks(range(len(CODEBOOKS)), CODEBOOKS)
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend()
    return figure


EXPERIMENT = Experiment(
    name="datatypes_finetuned",
    question="Which 4-bit data type is best after QLoRA fine-tuning, and does it reach 16 bits?",
    paper="QLoRA Table 4: mean MMLU BF16 53.0, Float4 52.2, NF4 with double quantization 53.1",
    expected="nf4 with double quantization as good as 16-bit LoRA; fp4 a little behind",
    cost="2 CPU cores, 2 GiB: the seeds of a data type train together",
    axes={"config": [inputs.CONFIG], "codebook": CODEBOOKS, "double_quant": [True, False]},
    more=[{"config": inputs.CONFIG, "codebook": PLAIN, "double_quant": False}],
    seeds=(0, 1, 2),
    inputs=inputs.made,
    estimate=costs.by("config", {inputs.CONFIG: 20}, 2),
    run=run,
    analyse=analyse,
    population=Population(
        together, lambda c: (c["config"], c["codebook"], c["double_quant"]), largest=8
    ),
)
