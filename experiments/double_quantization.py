"""Measures the memory that double quantization saves, and the loss that it adds.

qlora-jax sweep double_quantization
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Metric, columns, first, interval, line, measured
from qlora_jax.sweep.statistics import difference, within

SAVED = 0.373
"""Bits saved per parameter at block 64: 32/64 - 8/64 - 32/(64 * 256) (QLoRA, section 3)."""

LOST = 0.01
"""Largest added loss that counts as "without degrading performance", in nats per token: 1% of
perplexity."""


def bits(model: Any) -> float:
    """Returns the bits per quantized parameter, with the bits of the scales."""
    from qlora_jax.models.trees import quantized_size

    return quantized_size(model)[0]


METRICS: Mapping[str, Metric[Any]] = {"bits": Metric(bits, "bits per parameter", first)}
"""Figures of a quantized model, in addition to its loss on each text."""


def run(cell: Cell, context: Context) -> Rows:
    import jax.numpy as jnp

    from qlora_jax.config import QuantConfig
    from qlora_jax.formats.load import load_model

    double = cell["double_quant"]
    if cell["stage"] == "fine-tuned":
        settings = {"quant.double_quant": double, "train.seed": cell["seed"]}
        found = cells.finetuned(cell["model"], context.folder, settings)
        return {"text": "held out", "loss": found["loss"]}
    checkpoint = cells.opened(cell["model"])
    model = load_model(checkpoint, quant=QuantConfig(double_quant=double), dtype=jnp.float32)
    figures = measured(METRICS, model)
    return [
        {"text": text, "loss": loss, **figures}
        for text, loss in cells.losses(model, checkpoint).items()
    ]


def skip(cell: Cell) -> str | None:
    if cell["stage"] == "quantized" and cell["seed"] != 0:
        return "quantizing draws no random numbers: seed 0 stands for all"
    return None


def analyse(table: Table) -> Analysis:
    by = {"quantized": ["model", "text"], "fine-tuned": ["model", "seed"]}
    costs = {
        stage: difference(*own.paired("loss", "double_quant", True, False, by[stage]))
        for (stage,), own in table.groups("stage").items()
    }
    quantized = table.where(stage="quantized")
    sides = quantized.paired("bits", "double_quant", False, True, ["model", "text"])
    saved = difference(*sides)
    worst = max(costs.values(), key=lambda interval: interval.high)
    loss = "; ".join(f"{stage}: {cost}" for stage, cost in costs.items())
    shown = {**columns(METRICS), "loss": interval("loss")}
    rows = [
        {"stage": stage, "model": model, "double quantization": double, **line(own, shown)}
        for (stage, model, double), own in table.groups("stage", "model", "double_quant").items()
    ]
    return Analysis(
        Verdict(
            f"saves {saved.mean:.3f} bits per parameter (paper: {SAVED}) and adds to the loss, in "
            f"nats per token, {loss}",
            worst,
            within(worst, high=LOST),
        ),
        {"Bits and loss with and without": markdown(rows)},
        {"double_quantization": _picture(table, by)},
    )


def _picture(table: Table, by: dict[str, list[str]]) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(table.values("stage")), squeeze=False)[0]
    for ax, ((stage,), own) in zip(axes, table.groups("stage").items()):
        double, plain = own.paired("loss", "double_quant", True, False, by[stage])
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.axhspan(-LOST, LOST, alpha=0.15, label=f"within {LOST} nats")
        ax.plot([a - b for a, b in zip(double, plain)], "o", label="one text or one seed")
        ax.set_xticks([])
        ax.set_title(stage)
        ax.set_ylabel("loss with - without, nats per token")
        ax.legend()
    return figure


def _grid(stage: str, model: str) -> list[dict[str, Any]]:
    return [{"stage": stage, "model": model, "double_quant": double} for double in (True, False)]


EXPERIMENT = Experiment(
    name="double_quantization",
    question="What do quantized scales save, and what do they cost?",
    paper="QLoRA, section 3: 0.373 bits per parameter less at block 64 (4.5 to 4.127), without "
    "degrading performance (Table 3: NF4 with double quantization equals BF16)",
    expected="0.373 bits less; losses that differ by less than their noise",
    cost="2 CPU cores, 2 GiB",
    axes={"stage": ["fine-tuned"], "model": [inputs.CONFIG], "double_quant": [True, False]},
    more=[point for model in inputs.MODELS for point in _grid("quantized", model)],
    inputs=inputs.made,
    estimate=costs.by(
        "model",
        {
            inputs.CONFIG: 36,
            **dict(zip(inputs.PRETRAINED, (14, 5, 8))),
            "smollm2-135m-instruct": 62,
        },
        2,
    ),
    run=run,
    analyse=analyse,
    skip=skip,
)
