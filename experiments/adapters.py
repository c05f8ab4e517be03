"""Measures the size of an adapter, the time to switch, and which adapter serves a task best.

qlora-jax sweep adapters
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Column, Metric, columns, line, measured
from qlora_jax.sweep.statistics import Interval, difference, mean, within

TASKS: dict[str, dict[str, Any]] = {
    "python questions": {"data.source": "python-docs", "data.format": "auto"},
    "python source": {"data.source": "python-source", "data.format": "text"},
    "package docs": {"data.source": "package-docs", "data.format": "text"},
    "python docs": {"data.source": "python-docs", "data.format": "text"},
}


def run(cell: Cell, context: Context) -> Rows:
    own = TASKS[cell["task"]]
    settings = {**own, "train.seed": cell["seed"], "data.max_examples": 1500}
    cells.finetuned(cell["config"], context.folder, settings)
    run = context.folder / cells.RUN
    restored = cells.trained(run)
    costs = measured(METRICS, _Tuned(run / "adapter", restored))
    return [
        {"scored_on": task, "task_loss": _loss(restored, data), **costs}
        for task, data in TASKS.items()
    ]


def _loss(restored: Any, data: dict[str, Any]) -> float:
    from qlora_jax import config as configs
    from qlora_jax.evaluate.heldout import held_out_loss

    settings = {**data, "data.max_examples": "1500", "train.eval_rows": "16"}
    config = configs.changed(restored.config, settings)
    found = held_out_loss(dataclasses.replace(restored, config=config))
    return next(iter(found.values())).loss


class _Tuned(NamedTuple):
    """A finished run: folder of its adapter, and the restored model, config and tokenizer."""

    adapter: Path
    restored: Any


def adapter_bytes(tuned: _Tuned) -> int:
    """Returns the bytes of the adapter's files."""
    return sum(file.stat().st_size for file in tuned.adapter.iterdir())


def base_bytes(tuned: _Tuned) -> int:
    """Returns the bytes of the pretrained weights in memory."""
    import jax
    from flax import nnx

    from qlora_jax.lora import Weight

    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(tuned.restored.model, Weight)))


def switch_seconds(tuned: _Tuned) -> float:
    """Returns the seconds to read an adapter's folder and write the adapter into a loaded model.

    The next forward pass uses the adapter. The result is the median of five switches. One more
    switch before them is not counted, because it compiles the write to a slot.
    """
    import jax
    from flax import nnx

    from qlora_jax.formats.peft.plain import read_plain
    from qlora_jax.lora.weights import largest_rank
    from qlora_jax.models.adapters import attach_bank, put_adapter
    from qlora_jax.train.restore import from_config

    model = from_config(tuned.restored.config, print).model
    attach_bank(model, slots=2, rank=largest_rank(read_plain(tuned.adapter)), dtype="float32")
    seconds = []
    for i in range(6):
        began = time.perf_counter()
        put_adapter(model, i % 2, read_plain(tuned.adapter, model))
        jax.block_until_ready(nnx.state(model))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def _of_runs(figure: str) -> Column:
    """Returns a column of a figure's mean over runs; a run has one row for every task."""
    return lambda rows: str(_mean_of_runs(rows, figure))


def _mean_of_runs(rows: Table, figure: str) -> Interval:
    return mean([own.rows[0][figure] for own in rows.groups("task", "seed").values()])


METRICS: Mapping[str, Metric[_Tuned]] = {
    "adapter_bytes": Metric(adapter_bytes),
    "base_bytes": Metric(base_bytes),
    "switch_s": Metric(
        switch_seconds, "seconds to switch (read a folder, fill a slot)", show=_of_runs
    ),
}
"""Costs of an adapter. A cost is measured once per run and repeated in every row of the run;
`_of_runs` counts it once per run."""

COSTS: Mapping[str, Column] = {
    "bytes of an adapter": lambda rows: f"{rows.rows[0]['adapter_bytes']:,}",
    "bytes of the base, shared": lambda rows: f"{rows.rows[0]['base_bytes']:,}",
    "N tasks as N models, per task": lambda rows: (
        f"{rows.rows[0]['base_bytes'] / rows.rows[0]['adapter_bytes']:.0f} adapters"
    ),
    **columns(METRICS),
}


def analyse(table: Table) -> Analysis:
    tasks = table.values("task")
    gaps = [_gap(table, task) for task in tasks]
    least = min(gaps, key=lambda interval: interval.low)
    first = table.rows[0]
    adapter, base = first["adapter_bytes"], first["base_bytes"]
    switch = _mean_of_runs(table, "switch_s")
    matrix = [
        {
            "adapter of": task,
            **{
                other: mean(table.where(task=task, scored_on=other).column("task_loss")).mean
                for other in tasks
            },
        }
        for task in tasks
    ]
    costs = [{"what": what, "value": value} for what, value in line(table, COSTS).items()]
    return Analysis(
        Verdict(
            f"each task is best served by its own adapter, by at least {least} nats per token; an "
            f"adapter takes {adapter / 2**20:.2f} MiB beside a base of {base / 2**20:.1f} MiB and "
            f"is switched in {switch.mean * 1000:.0f} ms",
            least,
            within(least, low=0.0),
        ),
        {
            "Held-out loss of each task under each adapter, nats per token": markdown(matrix),
            "What it takes": markdown(costs),
        },
        {"adapters": _picture(table, tasks)},
    )


def _gap(table: Table, task: str) -> Interval:
    """Returns the task's loss under the best other adapter minus that under its own adapter."""
    own = table.where(task=task, scored_on=task)
    others = [
        min(
            row["task_loss"]
            for row in table.where(scored_on=task, seed=seed).rows
            if row["task"] != task
        )
        for seed in own.column("seed")
    ]
    return difference(others, own.column("task_loss"))


def _picture(table: Table, tasks: list[str]) -> Figure:
    losses = np.array(
        [
            [mean(table.where(task=a, scored_on=t).column("task_loss")).mean for t in tasks]
            for a in tasks
        ]
    )
    above = losses - losses.min(axis=0)
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(above, cmap="viridis_r")
    for i, j in np.ndindex(above.shape):
        dark = above[i, j] > above.max() / 2
        axes.text(j, i, f"{losses[i, j]:.2f}", ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(tasks)), tasks, rotation=20)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("scored on")
    axes.set_ylabel("adapter of")
    figure.colorbar(shown, label="nats per token above the best adapter")
    return figure


EXPERIMENT = Experiment(
    name="adapters",
    question="One base, many tasks: what does an adapter take, what does switching cost, and is "
    "each task best served by its own?",
    paper="LoRA, section 4.2: a GPT-3 adapter of r 4 takes 35 MB instead of 350 GB; 100 adapted "
    "models take 354 GB instead of 35 TB; tasks are switched by swapping A and B",
    expected="the diagonal of the matrix is best; an adapter is a few percent of the base",
    cost="2 CPU cores, 2 GiB",
    axes={"config": [inputs.CONFIG], "task": list(TASKS)},
    inputs=inputs.made,
    estimate=costs.by("config", {inputs.CONFIG: 20}, 2),
    run=run,
    analyse=analyse,
)
