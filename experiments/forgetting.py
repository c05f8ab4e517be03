"""Measures whether a model forgets less when adapters learn the new task.

qlora-jax sweep forgetting
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from experiments.parity import ARMS, CLAIMED, REFERENCE
from qlora_jax.runtime.errors import RunFailed
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Metric, average, columns, lines, measured
from qlora_jax.sweep.statistics import difference, mean, within

USED = ("full", REFERENCE, CLAIMED)
OLD = "python-source"
"""Source of the text that the base was trained on and that it may forget."""


class _Tuned(NamedTuple):
    """A restored run, and the loss on the old text after training and of the base before it."""

    restored: Any
    old: float
    base: float


METRICS: Mapping[str, Metric[_Tuned]] = {
    "old_loss": Metric(lambda tuned: tuned.old),
    "forgotten": Metric(lambda tuned: tuned.old - tuned.base, "forgotten, nats", average),
}
"""Figures of a run, in addition to those of `cells.finetuned`."""


def run(cell: Cell, context: Context) -> Rows:
    import jax.numpy as jnp

    from qlora_jax.evaluate.perplexity import text_loss

    settings = {
        **ARMS[cell["arm"]],
        "train.steps": cell["steps"],
        "train.seed": cell["seed"],
        "train.eval_every": 0,
    }
    found = cells.finetuned(cell["config"], context.folder, settings)
    restored = cells.trained(context.folder / cells.RUN)
    checkpoint = cells.opened(restored.config.model.path)
    ids = cells.text_ids(checkpoint.tokenizer_path, OLD, inputs.TOKENS)
    old = text_loss(restored.model, ids, window=inputs.WINDOW, dtype=jnp.float32).loss
    base = cells.base_loss(restored.config.model.path, OLD)
    return {**found, **measured(METRICS, _Tuned(restored, old, base))}


def analyse(table: Table) -> Analysis:
    level = _common_level(table)
    at = {
        arm: [_at(own, level) for own in table.where(arm=arm).groups("seed").values()]
        for arm in USED
    }
    gaps = {arm: difference(at["full"], at[arm]) for arm in USED if arm != "full"}
    decides = gaps[CLAIMED]
    rows = [
        {
            "arm": arm,
            f"forgotten at {level:.3f} nats on the new task [95%]": str(mean(values)),
            "less than full fine-tuning [95%]": str(gaps.get(arm, "")),
        }
        for arm, values in at.items()
    ]
    shown = {"loss on the new task": average("loss"), **columns(METRICS)}
    return Analysis(
        Verdict(
            f"at equal loss on the new task full fine-tuning forgets more than {CLAIMED} by "
            f"{decides} and more than {REFERENCE} by {gaps[REFERENCE]} nats per token",
            decides,
            within(decides, low=0.0),
        ),
        {
            "What the old text loses at equal loss on the new task": markdown(rows),
            "By training steps": markdown(lines(table, ["arm", "steps"], shown)),
        },
        {"forgetting": _picture(table, level)},
    )


def _common_level(table: Table) -> float:
    """Returns a loss on the new task that lies within the range of every run."""
    runs = [own.column("loss") for own in table.groups("arm", "seed").values()]
    low, high = max(min(r) for r in runs), min(max(r) for r in runs)
    if low > high:
        raise RunFailed("no loss on the new task is reached by every arm; change the steps")
    return low + 0.1 * (high - low)


def _at(run: Table, level: float) -> float:
    """Interpolates what a run forgot at loss `level` on the new task, linearly."""
    new, old = np.array(run.column("loss")), np.array(run.column("forgotten"))
    order = np.argsort(new)
    return float(np.interp(level, new[order], old[order]))


def _picture(table: Table, level: float) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(USED):
        for j, own in enumerate(table.where(arm=arm).groups("seed").values()):
            label = arm if j == 0 else None
            axes.plot(own.column("loss"), own.column("forgotten"), "o-", color=f"C{i}", label=label)
    axes.axvline(level, color="gray", linestyle=":", label="compared here")
    axes.invert_xaxis()
    axes.set_xlabel("held-out loss on the new task (further right: learned more)")
    axes.set_ylabel("loss added on the old text, nats per token")
    axes.legend()
    return figure


EXPERIMENT = Experiment(
    name="forgetting",
    question="At equal loss on a new task, does full fine-tuning forget more than adapters?",
    paper="no number in either paper; the article claims less forgetting, since the base is frozen",
    expected="full fine-tuning moves the old text's loss most",
    cost="2 CPU cores, 2 GiB",
    axes={"config": [inputs.CONFIG], "arm": list(USED), "steps": [10, 30, 60]},
    inputs=inputs.made,
    estimate=costs.by("arm", {"full": 16, "lora 16 bits": 9, "qlora nf4 + dq": 14}, 2),
    run=run,
    analyse=analyse,
)
