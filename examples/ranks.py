"""Does the rank matter when every linear has an adapter?

qlora-jax sweep examples/ranks.py
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax import config as configs
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
    statistics,
)
from qlora_jax.sweep.metrics import Metric, columns, lines, measured
from qlora_jax.train import population

METRICS: Mapping[str, Metric[Any]] = {
    "loss": Metric(lambda member: list(member.held_out.values())[-1], "held-out loss [95%]"),
    "norm": Metric(lambda member: member.norms[-1], "the last gradient's norm [95%]"),
}
"""Figures of a trained adapter: how each is measured, and the title of its column."""


def overrides(cell: Cell) -> dict[str, str]:
    return {"lora.rank": str(cell["rank"]), "train.seed": str(cell["seed"])}


def together(cells: Sequence[Cell], context: Context) -> list[Rows]:
    members = [overrides(cell) for cell in cells]
    found = population.train_population(
        configs.load_config(cells[0]["config"]), members, data_seed=0
    )
    return [measured(METRICS, member) for member in found]


def run(cell: Cell, context: Context) -> Rows:
    return together([cell], context)[0]


def analyse(table: Table) -> Analysis:
    ranks = table.values("rank")
    high, low = table.paired("loss", "rank", max(ranks), min(ranks), by=["seed"])
    gap = statistics.difference(high, low)
    return Analysis(
        Verdict(
            f"held-out loss of rank {max(ranks)} less that of rank {min(ranks)}, nats",
            gap,
            statistics.within(gap, -0.01, 0.01),
        ),
        {"By rank": markdown(lines(table, ["rank"], columns(METRICS)))},
    )


EXPERIMENT = Experiment(
    name="ranks",
    question="Does the rank matter when every linear has an adapter?",
    paper="No (QLoRA, figure 4).",
    expected="Differences below 0.01 nats.",
    cost="12 runs of 80 steps in populations of 4: about an hour on 2 CPU cores",
    axes={"config": ["configs/quickstart.yaml"], "rank": [8, 16, 32, 64]},
    seeds=(0, 1, 2),
    run=run,
    analyse=analyse,
    population=Population(
        together, key=lambda cell: (cell["config"], population.fixed(overrides(cell))), largest=4
    ),
)
