"""Measures which 4-bit data type loses least when a trained model is quantized.

qlora-jax sweep datatypes
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Metric, average, columns, line, measured
from qlora_jax.sweep.statistics import (
    AGREES,
    CONTRADICTS,
    UNDECIDED,
    Interval,
    difference,
    mean,
    within,
)

PLAIN = "16 bits"
PAPER = {"int4": 34.34, "fp4_e2m1": 31.07, "fp4_e3m0": 29.48, "nf4": 27.41}
"""Mean perplexity on Pile Common Crawl over models of 125M to 13B (QLoRA, Table 2); nf4 is with
double quantization."""

CODEBOOKS = ["int4", "fp4_e2m1", "fp4_e3m0", "fp4_bnb", "nf4", "af4", "lloyd"]
FLOATS = ["fp4_e2m1", "fp4_e3m0", "fp4_bnb"]


class _Quantized(NamedTuple):
    """A model's open checkpoint and its quantization config; None if it is not quantized."""

    checkpoint: Any
    quant: Any


def weight_error(quantized: _Quantized) -> float:
    """Returns the relative error of the quantized weights; 0 if none are quantized."""
    return cells.relative_error(*quantized) if quantized.quant else 0.0


METRICS: Mapping[str, Metric[_Quantized]] = {
    "weight_error": Metric(weight_error, "relative error of weights", average)
}
"""Figures of a quantized model, in addition to its loss on each text."""


def run(cell: Cell, context: Context) -> Rows:
    import jax.numpy as jnp

    from qlora_jax.config import QuantConfig
    from qlora_jax.formats.load import load_model

    quant = None
    if cell["codebook"] != PLAIN:
        quant = QuantConfig(
            codebook=cell["codebook"],
            block_size=cell["block_size"],
            double_quant=cell["double_quant"],
        )
    checkpoint = cells.opened(cell["model"])
    model = load_model(checkpoint, quant=quant, dtype=jnp.float32)
    figures = measured(METRICS, _Quantized(checkpoint, quant))
    return [
        {"text": text, "loss": loss, **figures}
        for text, loss in cells.losses(model, checkpoint).items()
    ]


def analyse(table: Table) -> Analysis:
    plain = {(r["model"], r["text"]): r["loss"] for r in table.where(codebook=PLAIN).rows}
    rows = [
        {**r, "increase": r["loss"] - plain[r["model"], r["text"]]}
        for r in table.rows
        if r["codebook"] != PLAIN and (r["model"], r["text"]) in plain
    ]
    increases = Table(rows)
    usual = increases.where(block_size=64, double_quant=True)
    names = [name for name in CODEBOOKS if name in usual.values("codebook")]
    best = min(names, key=lambda c: mean(usual.where(codebook=c).column("increase")).mean)
    summary = [_summary(usual, name) for name in names]
    return Analysis(
        _verdict(usual, [name for name in FLOATS if name in names], best),
        {
            "Block 64, double quantization: increase of the loss, mean over models and texts": (
                markdown(summary)
            ),
            "Perplexity by model and text, block 64, double quantization": markdown(
                _perplexities(table, plain)
            ),
            "More than nf4 loses, by model (mean over its texts)": markdown(
                _by_model(usual, names)
            ),
            "By block size": markdown(_blocks(increases)),
        },
        {"datatypes": _picture(usual, names)},
    )


def _verdict(usual: Table, floats: list[str], best: str) -> Verdict:
    """Judges whether nf4 loses less than the nearest FP4.

    The verdict agrees if at least one model agrees and none contradicts, and the other way round;
    else it is undecided. Each model is judged alone, because the loss from a data type differs a
    hundredfold between models. The interval is that of the model that loses most.
    """
    nearest, said = {}, {}
    for (model,), own in usual.groups("model").items():
        gaps = {name: _gap(own, name) for name in floats}
        name = min(gaps, key=lambda name: gaps[name].mean)
        nearest[model] = gaps[name]
        said[model] = within(gaps[name], low=0.0)
    most = max(nearest, key=lambda m: mean(usual.where(model=m).column("increase")).mean)
    told = {AGREES, CONTRADICTS} & set(said.values())
    judged = ", ".join(f"{cells.short(model)} {verdict}" for model, verdict in said.items())
    pooled = ", ".join(f"{name} - nf4: {_gap(usual, name)}" for name in floats)
    return Verdict(
        f"nats per token that the FP4 nearest to nf4 loses more, by model: {judged} (the interval: "
        f"{cells.short(most)}'s); over all models {pooled}; the least is lost by {best}",
        nearest[most],
        told.pop() if len(told) == 1 else UNDECIDED,
    )


def _gap(usual: Table, name: str) -> Interval:
    return difference(*usual.paired("increase", "codebook", name, "nf4", ["model", "text"]))


def _by_model(usual: Table, names: list[str]) -> list[dict[str, Any]]:
    return [
        {"model": model} | {name: str(_gap(own, name)) for name in names if name != "nf4"}
        for (model,), own in usual.groups("model").items()
    ]


def _summary(usual: Table, name: str) -> dict[str, Any]:
    shown = {**columns(METRICS), "increase, nats": average("increase")}
    gap = "" if name == "nf4" else str(_gap(usual, name))
    return {
        "codebook": name,
        **line(usual.where(codebook=name), shown),
        "more than nf4 [95%]": gap,
        "paper's perplexity (other models)": PAPER.get(name),
    }


def _perplexities(table: Table, plain: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    import math

    rows = []
    for (model, text), loss in plain.items():
        own = table.where(model=model, text=text, block_size=64, double_quant=True)
        found = {r["codebook"]: math.exp(r["loss"]) for r in own.rows}
        rows.append({"model": model, "text": text, PLAIN: math.exp(loss), **found})
    return rows


def _blocks(increases: Table) -> list[dict[str, Any]]:
    rows = []
    for (codebook,), own in increases.groups("codebook").items():
        cells_ = own.groups("block_size", "double_quant").items()
        rows.append(
            {"codebook": codebook}
            | {
                f"block {block}{', double' if double else ''}": mean(part.column("increase")).mean
                for (block, double), part in cells_
            }
        )
    return rows


def _picture(usual: Table, names: list[str]) -> Figure:
    models = usual.values("model")
    figure = Figure(figsize=(4.2 * len(models), 4), layout="constrained")
    for ax, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        own = usual.where(model=model)
        for text, marker in zip(own.values("text"), "osD^v"):
            part = own.where(text=text)
            x = [names.index(name) for name in part.column("codebook")]
            ax.scatter(x, part.column("increase"), marker=marker, alpha=0.7, label=text)
        means = [mean(own.where(codebook=name).column("increase")).mean for name in names]
        ax.plot(range(len(names)), means, "_k", markersize=22, label="mean")
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_title(cells.short(model))
    figure.axes[0].set_ylabel("loss above 16 bits, nats per token")
    figure.axes[-1].legend()
    return figure


EXPERIMENT = Experiment(
    name="datatypes",
    question="Which 4-bit data type loses least when a trained model is quantized? Does NF4 beat "
    "FP4, and which FP4?",
    paper="QLoRA Table 2: perplexity int4 34.34, fp4_e2m1 31.07, fp4_e3m0 29.48, nf4 with double "
    "quantization 27.41 (means over models of 125M to 13B)",
    expected="nf4 below every fp4 and int4; bitsandbytes' fp4, whose values are neither E2M1 nor "
    "E3M0, between; lloyd and af4, made for the block size, near nf4",
    cost="2 CPU cores, 2 GiB; a GPU takes models up to 13B",
    axes={
        "model": inputs.MODELS,
        "codebook": CODEBOOKS,
        "block_size": [64, 256],
        "double_quant": [True, False],
    },
    more=[
        {"model": m, "codebook": PLAIN, "block_size": 0, "double_quant": False}
        for m in inputs.MODELS
    ],
    seeds=(),
    inputs=inputs.made,
    estimate=costs.by(
        "model", {**dict(zip(inputs.PRETRAINED, (9, 12, 3))), "smollm2-135m-instruct": 61}, 2
    ),
    run=run,
    analyse=analyse,
)
