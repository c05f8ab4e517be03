"""Measures whether the rank matters, and which linears need an adapter.

qlora-jax sweep rank
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import cells, costs, inputs
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
from qlora_jax.sweep.metrics import Column, columns
from qlora_jax.sweep.statistics import difference, mean, within

RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
TARGETS: dict[str, str | list[str]] = {
    "q, v": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all linear": "all-linear",
}
POLICIES: dict[str, dict[str, Any]] = {
    "alpha 16": {"lora.alpha": 16, "lora.scaling": "alpha/r"},
    "scale 2": {"lora.alpha": 2, "lora.scaling": "constant"},
    "rsLoRA": {"lora.alpha": 8, "lora.scaling": "alpha/sqrt(r)"},
}
"""Scale as a function of the rank r: 16/r as in Guanaco, 2 for every r, 8/sqrt(r). The verdict uses
the first policy, because QLoRA's search over ranks held alpha fixed."""

LARGEST = 64
"""Largest rank in the verdict; the smallest is 8. The papers use this range."""

ALIKE = 0.03
"""Largest difference between two losses that counts as none, in nats per token."""


def settings(cell: Cell) -> dict[str, Any]:
    return {
        "lora.rank": cell["rank"],
        "lora.target_modules": TARGETS[cell["targets"]],
        "train.seed": cell["seed"],
        **POLICIES[cell["alpha"]],
    }


def together(group: Sequence[Cell], context: Context) -> list[Rows]:
    return cells.population(group[0]["config"], [settings(cell) for cell in group], context)


def run(cell: Cell, context: Context) -> Rows:
    return together([cell], context)[0]


def skip(cell: Cell) -> str | None:
    least = _smallest_side(cell["config"], cell["targets"])
    if cell["rank"] > least:
        return f"rank {cell['rank']} is above the smallest side of a targeted matrix, {least}"
    return None


@functools.cache
def _smallest_side(config: str, targets: str) -> int:
    return min(min(shape) for shape in cells.linears(config, TARGETS[targets]).values())


def key(cell: Cell) -> tuple[Any, ...]:
    # ranks above 16 train apart, because every member is padded to the largest rank of its group
    return cell["config"], "small" if cell["rank"] <= 16 else cell["rank"]


def analyse(table: Table) -> Analysis:
    policies = [policy for policy in POLICIES if len(table.where(alpha=policy))]
    usual = table.where(alpha=policies[0])
    ranks = [r for r in usual.where(targets="all linear").values("rank") if 8 <= r <= LARGEST]
    low, high = min(ranks), max(ranks)
    spreads = {
        policy: difference(
            *table.where(alpha=policy, targets="all linear").paired(
                "loss", "rank", low, high, ["seed"]
            )
        )
        for policy in policies
    }
    told = ", ".join(f"{policy} {spread}" for policy, spread in spreads.items())
    few = usual.where(rank=high)
    gap = difference(*few.paired("loss", "targets", "q, v", "all linear", ["seed"]))
    spread = spreads[policies[0]]
    return Analysis(
        Verdict(
            f"all linears: the loss of rank {low} less that of rank {high}, by policy: {told}; at "
            f"rank {high}, q and v alone lose {gap} to all linears",
            spread,
            within(spread, -ALIKE, ALIKE),
        ),
        {
            f"{title}, {policy}": _grid(table.where(alpha=policy), column)
            for title, column in SHOWN.items()
            for policy in policies
        },
        {"rank": _picture(table, policies)},
    )


def _spread(figure: str) -> Column:
    """Returns a column of a figure's mean ± half the width of its interval."""

    def shown(rows: Table) -> str:
        found = mean(rows.column(figure))
        return f"{found.mean:.3f} ± {found.high - found.mean:.3f}"

    return shown


SHOWN: Mapping[str, Column] = {"Held-out loss": _spread("loss"), **columns(cells.MEMBER)}
"""Title of each table to its column: one figure of the members, by rank and targets."""


def _grid(table: Table, column: Column) -> str:
    rows = []
    for (targets,), own in table.groups("targets").items():
        found: dict[str, Any] = {"targets": targets}
        for (rank,), part in own.groups("rank").items():
            found[f"r {rank}"] = column(part)
        found["trainable at r 8"] = f"{own.where(rank=8).rows[0]['share']:.2%}"
        rows.append(found)
    return markdown(rows)


def _picture(table: Table, policies: list[str]) -> Figure:
    figure = Figure(figsize=(1 + 4.5 * len(policies), 4), layout="constrained")
    axes = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    for ax, policy in zip(axes, policies):
        for (targets,), own in table.where(alpha=policy).groups("targets").items():
            points = {
                rank: mean(part.column("loss")) for (rank,), part in own.groups("rank").items()
            }
            middle = [p.mean for p in points.values()]
            half = [p.high - p.mean for p in points.values()]
            ax.errorbar(list(points), middle, half, marker="o", capsize=3, label=targets)
        ax.set_xscale("log", base=2)
        ax.set_xticks(RANKS, [str(r) for r in RANKS])
        ax.set_xlabel("rank")
        ax.set_title(policy)
    axes[0].set_ylabel("held-out loss, nats per token")
    axes[0].legend()
    return figure


EXPERIMENT = Experiment(
    name="rank",
    question="Does the rank matter once all linears have adapters, and how far do q and v get?",
    paper="QLoRA Fig. 4: the rank does not matter if all linears are adapted; LoRA Table 6: r 1 "
    "to 64 differ by a point of accuracy; q and v at r 4 equal more matrices at lower rank",
    expected="little difference from r 8 on over all linears; q and v alone behind; a fixed alpha "
    "learns too slowly at high ranks, rsLoRA and a constant scale do not",
    cost="2 CPU cores, 2 GiB: 16 adapters at a time",
    axes={
        "config": [inputs.CONFIG],
        "rank": RANKS,
        "targets": list(TARGETS),
        "alpha": list(POLICIES),
    },
    inputs=inputs.made,
    estimate=costs.by("config", {inputs.CONFIG: 9}, 2),
    run=run,
    analyse=analyse,
    skip=skip,
    population=Population(together, key, largest=16),
)
