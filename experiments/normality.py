"""Are the weights that are quantized normal, as NF4 assumes?

qlora-jax sweep normality
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import cells, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.statistics import mean, within

ROWS = 96
"""Units of each matrix that are tested, evenly apart."""

PAPER = 0.075
"""Share of a 7B LLaMA's units that a Shapiro-Wilk test at 5% rejects (QLoRA, appendix F)."""

CLAIM = 0.15
"""Up to which share of units "mostly normal" is judged: twice the paper's, as 5% are chance."""


def run(cell: Cell, context: Context) -> Rows:
    import jax.numpy as jnp

    from qlora_jax.models.parts import linears
    from qlora_jax.quant import quantize
    from qlora_jax.quant.error import (
        code_counts,
        entropy,
        normality_rejected,
        quantization_error,
    )

    checkpoint = cells.opened(cell["model"])
    config = checkpoint.config
    rows: list[dict[str, Any]] = []
    for layer in range(config.num_layers):
        for path in linears(config):
            w = np.asarray(checkpoint.read(f"{config.names.layers}.{layer}.{path}.weight"))
            w = w.astype(np.float32).T
            some = np.linspace(0, w.shape[1] - 1, min(ROWS, w.shape[1])).astype(int)
            found = {}
            for codebook in ("nf4", "fp4_bnb", "int4"):
                q = quantize(jnp.asarray(w), codebook)
                found[f"entropy {codebook}"] = entropy(code_counts(q))
                error = quantization_error(w, q)
                found[f"error {codebook}"] = error.relative_mse**0.5
            rows.append(
                {
                    "layer": layer,
                    "linear": path.rpartition(".")[2],
                    "rejected": normality_rejected(w[:, some]),
                    "kurtosis": float(np.mean((w / w.std()) ** 4) - 3),
                    "outliers": float(np.mean(np.abs(w) > 6 * w.std())),
                    **found,
                }
            )
        context.progress(f"layer {layer + 1}/{config.num_layers}")
    return rows


def analyse(table: Table) -> Analysis:
    rows = []
    for (model, linear), own in table.groups("model", "linear").items():
        names = ("rejected", "kurtosis", "outliers", "entropy nf4", "entropy fp4_bnb")
        errors = ("error nf4", "error fp4_bnb", "error int4")
        means = {name: mean(own.column(name)).mean for name in (*names, *errors)}
        rows.append({"model": model, "linear": linear, **means})
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
    cost="about 4 minutes on 2 CPU cores, 1 GiB",
    axes={"model": inputs.MODELS},
    seeds=(),
    run=run,
    analyse=analyse,
)
