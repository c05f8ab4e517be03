"""Tests whether the weights that are quantized are normal, as NF4 assumes.

qlora-jax sweep normality
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Metric, average, columns, lines, measured
from qlora_jax.sweep.statistics import mean, within

ROWS = 96
"""Number of output units of each matrix that are tested, evenly spaced."""

PAPER = 0.075
"""Share of a 7B LLaMA's units that a Shapiro-Wilk test at 5% rejects (QLoRA, appendix F)."""

CODEBOOKS = ("nf4", "fp4_bnb", "int4")

CLAIM = 0.15
"""Largest share of rejected units that counts as "mostly normal": twice the paper's share, because
5% are rejected by chance."""


class _Matrix(NamedTuple):
    """The weight of one linear, exact and quantized.

    Attributes:
      w: exact weight, float32[in, out].
      quantized: codebook to the quantized weight, a `QTensor`.
    """

    w: np.ndarray
    quantized: Mapping[str, Any]


def rejected(matrix: _Matrix) -> float:
    """Returns the share of `ROWS` output units that a test at 5% rejects as not normal."""
    from qlora_jax.quant.error import normality_rejected

    units = matrix.w.shape[1]
    some = np.linspace(0, units - 1, min(ROWS, units)).astype(int)
    return normality_rejected(matrix.w[:, some])


def kurtosis(matrix: _Matrix) -> float:
    """Returns the excess kurtosis: the kurtosis minus 3, that of a normal distribution."""
    return float(np.mean((matrix.w / matrix.w.std()) ** 4) - 3)


def outliers(matrix: _Matrix) -> float:
    """Returns the share of weights beyond six standard deviations."""
    return float(np.mean(np.abs(matrix.w) > 6 * matrix.w.std()))


def entropy(codebook: str, matrix: _Matrix) -> float:
    """Returns the entropy of the 4-bit codes, in bits."""
    from qlora_jax.quant.error import code_counts, entropy

    return entropy(code_counts(matrix.quantized[codebook]))


def error(codebook: str, matrix: _Matrix) -> float:
    """Returns the relative error of the quantized weights."""
    from qlora_jax.quant.error import quantization_error

    return quantization_error(matrix.w, matrix.quantized[codebook]).relative_mse ** 0.5


METRICS: Mapping[str, Metric[_Matrix]] = {
    "rejected": Metric(rejected, "rejected", average),
    "kurtosis": Metric(kurtosis, "kurtosis", average),
    "outliers": Metric(outliers, "outliers", average),
    "entropy nf4": Metric(partial(entropy, "nf4"), "entropy nf4", average),
    "error nf4": Metric(partial(error, "nf4"), "error nf4", average),
    "entropy fp4_bnb": Metric(partial(entropy, "fp4_bnb"), "entropy fp4_bnb", average),
    "error fp4_bnb": Metric(partial(error, "fp4_bnb"), "error fp4_bnb", average),
    "entropy int4": Metric(partial(entropy, "int4")),
    "error int4": Metric(partial(error, "int4"), "error int4", average),
}
"""Figures of a linear; those with a title are columns of the table."""

LEADING = ("rejected", "kurtosis", "outliers", "entropy nf4", "entropy fp4_bnb")
"""Names of the metrics whose columns come first."""


def run(cell: Cell, context: Context) -> Rows:
    import jax.numpy as jnp

    from qlora_jax.models.weight_shapes import linears
    from qlora_jax.quant import quantize

    checkpoint = cells.opened(cell["model"])
    config = checkpoint.config
    rows: list[dict[str, Any]] = []
    for layer in range(config.num_layers):
        for path in linears(config):
            w = np.asarray(checkpoint.read(f"{config.names.layers}.{layer}.{path}.weight"))
            w = w.astype(np.float32).T
            quantized = {name: quantize(jnp.asarray(w), name) for name in CODEBOOKS}
            figures = measured(METRICS, _Matrix(w, quantized))
            rows.append({"layer": layer, "linear": path.rpartition(".")[2], **figures})
        context.progress(f"layer {layer + 1}/{config.num_layers}")
    return rows


def analyse(table: Table) -> Analysis:
    shown = columns(METRICS, LEADING)
    rows = lines(table, ["model", "linear"], shown)
    by_model = {
        model: mean(own.column("rejected"), method="bootstrap")
        for (model,), own in table.groups("model").items()
    }
    never = {m: found for m, found in by_model.items() if m not in inputs.ONCE_4_BIT}
    worst = max((never or by_model).values(), key=lambda interval: interval.mean)
    said = ", ".join(f"{model}: {interval}" for model, interval in by_model.items())
    return Analysis(
        Verdict(
            f"share of units that are not normal at 5% (paper: {PAPER}; chance: 0.05): {said}",
            worst,
            within(worst, high=CLAIM),
        ),
        {"Mean over layers; entropy in bits of 4, error relative": markdown(rows)},
        {"normality": _picture(table)},
    )


def _picture(table: Table) -> Figure:
    models = table.values("model")
    figure = Figure(figsize=(4 * len(models), 3.6), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, model in zip(axes, models):
        for (linear,), own in table.where(model=model).groups("linear").items():
            ax.plot(own.column("layer"), own.column("rejected"), ".-", label=linear)
        ax.axhline(PAPER, color="gray", linestyle=":", label="LLaMA 7B, paper")
        ax.set_title(cells.short(model))
        ax.set_xlabel("layer")
    axes[0].set_ylabel("share of units not normal")
    axes[0].legend(fontsize="small")
    return figure


EXPERIMENT = Experiment(
    name="normality",
    question="Are the weights that are quantized normal, as NF4 assumes, and how are its sixteen "
    "values used?",
    paper="QLoRA, appendix F: a Shapiro-Wilk test at 5% rejects 7.5% of a 7B LLaMA's units, 2.5 "
    "points above chance",
    expected="most units of trained weights normal; those of SmolLM2, which were 4-bit once and "
    "have few distinct values, less so; nf4's codes used most evenly",
    cost="2 CPU cores, 1 GiB",
    axes={"model": inputs.MODELS},
    seeds=(),
    inputs=inputs.made,
    estimate=costs.by(
        "model", {**dict(zip(inputs.PRETRAINED, (7, 4, 5))), "smollm2-135m-instruct": 49}, 1
    ),
    run=run,
    analyse=analyse,
)
