"""Checks the memory claims of the papers, line by line.

qlora-jax sweep memory_claims
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments import costs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Column, Metric, columns, first, line, measured
from qlora_jax.sweep.statistics import Interval, within

GIB = 2**30


class Claim(NamedTuple):
    """A training run and a published claim about its memory.

    Attributes:
      model: name of the model's published shapes.
      gpu: GPU to compile for.
      sequence: sequence length in tokens.
      said: source of the claim, and the claim.
      limit: GB that the claim allows.
    """

    model: str
    gpu: str
    sequence: int
    said: str
    limit: float


CLAIMS = {
    "7B on a T4": Claim("llama-7b", "t4", 512, "article: fits a 16 GB T4", 16),
    "65B under 48 GB": Claim("llama-65b", "a6000", 512, "QLoRA: 48 GB, from over 780 GB", 48),
    "33B in 24 GB": Claim("llama-33b", "rtx4090", 512, "QLoRA, section 5: 24 GB", 24),
    "13B": Claim("llama-13b", "t4", 512, "QLoRA Fig. 8: 11.3 GB", 11.3),
}


class _Planned(NamedTuple):
    """A claim and the plan of its run, from `plan.describe`."""

    claim: Claim
    plan: Mapping[str, Any]


def _by(figure: str) -> Column:
    """Returns a column that names the source of the figures: the compiler or the formula."""
    return lambda rows: (
        f"the compiler for {CLAIMS[rows.rows[0]['claim']].gpu}"
        if rows.rows[0][figure]
        else "formula"
    )


METRICS: Mapping[str, Metric[_Planned]] = {
    "said": Metric(lambda planned: planned.claim.said, "said", first),
    "limit_gb": Metric(lambda planned: planned.claim.limit),
    "gb": Metric(lambda planned: planned.plan["device_gib"] * GIB / 1e9, "ours, GB", first),
    "compiled": Metric(lambda planned: planned.plan["compiled"], "by", _by),
    "components": Metric(lambda planned: planned.plan["components"]),
}
"""Figures of a claim's run; those with a title are columns of the table of runs."""


def run(cell: Cell, context: Context) -> Rows:
    from qlora_jax.commands import plan
    from qlora_jax.gpu.compile import has_plugin
    from qlora_jax.gpu.described import read_gpu
    from qlora_jax.models.shapes import find
    from qlora_jax.plan import paper_claims
    from qlora_jax.plan.plan import planned

    if cell["claim"] == "the papers' sums":
        return [
            {"line": line.what, "ours": str(line).split(";")[0], "said": line.paper}
            for line in paper_claims.paper_claims()
        ]
    claim = CLAIMS[cell["claim"]]
    config = plan.of_model(
        claim.model, {"data.sequence_length": str(claim.sequence), "model.remat": "full"}
    )
    config = plan.suited(config, read_gpu(claim.gpu).capability)
    model = find(claim.model)
    made = planned(config, model, claim.gpu, print, []) if has_plugin() else None
    found = plan.describe(model, config, claim.gpu, made)
    return {"line": cell["claim"], **measured(METRICS, _Planned(claim, found))}


def analyse(table: Table) -> Analysis:
    runs = Table([row for row in table.rows if "gb" in row])
    sums = [row for row in table.rows if "gb" not in row]
    over = max(runs.rows, key=lambda row: row["gb"] / row["limit_gb"])
    share = over["gb"] / over["limit_gb"]
    shown = columns(METRICS)
    rows = [{"run": row["line"], **line(Table([row]), shown)} for row in runs.rows]
    parts = [
        {"run": row["line"], **{k: f"{v / 1e9:.2f}" for k, v in _flat(row["components"]).items()}}
        for row in runs.rows
    ]
    said = "; ".join(
        f"{row['line']}: {row['gb']:.1f} of {row['limit_gb']:g} GB" for row in runs.rows
    )
    held = sum(row["gb"] <= row["limit_gb"] for row in runs.rows)
    how = "compiled for, not run on" if over["compiled"] else "by formula"
    exact = Interval(share, share, share, 1)
    return Analysis(
        Verdict(
            f"{said} ({how}); {held} of {len(runs)} within what was said",
            exact,
            within(exact, high=1.0),
        ),
        {
            "Runs": markdown(rows),
            "Their parts, GB": markdown(parts),
            "The papers' sums": markdown(
                [
                    {"what": r["line"], "ours": r["ours"].partition(": ")[2], "paper": r["said"]}
                    for r in sums
                ]
            ),
        },
        {"memory_claims": _picture(runs)},
    )


def _flat(components: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(part["nbytes"])
        for name, part in components.items()
        if part["place"] == "device"
    }


def _picture(runs: Table) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(n for row in runs.rows for n in _flat(row["components"])))
    left = [0.0] * len(runs)
    for name in names:
        sizes = [_flat(row["components"]).get(name, 0.0) / 1e9 for row in runs.rows]
        axes.barh(range(len(runs)), sizes, left=left, label=name)
        left = [a + b for a, b in zip(left, sizes)]
    axes.plot(
        [r["limit_gb"] for r in runs.rows], range(len(runs)), "k|", markersize=18, label="said"
    )
    axes.set_yticks(range(len(runs)), [row["line"] for row in runs.rows])
    axes.set_xlabel("GB")
    axes.legend(fontsize="x-small", ncols=2)
    return figure


EXPERIMENT = Experiment(
    name="memory_claims",
    question="Do the papers' memory claims hold, line by line?",
    paper="QLoRA: 65B from over 780 GB to under 48 GB, 7B in 6.9 GB (Fig. 8); LoRA, section 4.2: "
    "three times less memory, 0.01% of GPT-3's parameters trained; article: 7B inside a T4",
    expected="all of them, with moments on the host and layers recomputed",
    cost="2 CPU cores, 1 GiB; quicker, and by formula, without the compile-only GPU packages (make "
    "install EXTRA=gpu-check)",
    axes={"claim": [*CLAIMS, "the papers' sums"]},
    seeds=(),
    estimate=costs.by("claim", {**dict.fromkeys(CLAIMS, 19), "the papers' sums": 1}, 1),
    run=run,
    analyse=analyse,
)
