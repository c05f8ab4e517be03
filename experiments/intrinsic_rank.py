"""How many directions does fine-tuning move, and are they the same ones each time?

qlora-jax sweep intrinsic_rank
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

import cells
import inputs
from parity import FULL, LOW_RANK
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.statistics import difference, mean, within

SMALL, LARGE = 8, 64
TOP = 4
"""Directions of the amplification table."""


def run(cell: Cell, context: Context) -> Rows:
    from qlora_jax.lora.analysis import (
        amplification,
        rank_of_energy,
        singular_values,
        subspace_similarity,
    )

    seed = cell["seed"]
    full = _updates(cell, context, {"method": "full", "optimizer.learning_rate": FULL}, seed)
    runs = {
        name: _updates(cell, context, _lora(rank), own)
        for name, rank, own in (
            ("small", SMALL, seed),
            ("large", LARGE, seed),
            ("again", LARGE, seed + 1000),
        )
    }
    a = {name: found[cell["module"]].a for name, found in runs.items()}
    base, change = full[cell["module"]].base, full[cell["module"]].change
    values = singular_values(change)
    random = np.random.default_rng(seed)
    noise = [random.normal(size=a["large"].shape) for _ in range(2)]
    large = runs["large"][cell["module"]]
    amplified = amplification(base, large.change, TOP, seed)
    return {
        "singular_values": values.tolist(),
        "weight_values": singular_values(base).tolist(),
        "rank_of_90": rank_of_energy(values, 0.9),
        "sides": min(change.shape),
        "small_large": subspace_similarity(a["small"], a["large"]).tolist(),
        "seeds": subspace_similarity(a["large"], a["again"]).tolist(),
        "random": subspace_similarity(*noise).tolist(),
        "start": subspace_similarity(large.start, a["large"]).tolist(),
        "within_update": amplified.within_update,
        "within_weight": amplified.within_weight,
        "within_random": amplified.within_random,
        "weight": amplified.weight,
        "update": amplified.update,
        "factor": amplified.factor,
    }


def _lora(rank: int) -> dict[str, Any]:
    return {
        "method": "lora",
        "optimizer.learning_rate": LOW_RANK,
        "lora.rank": rank,
        "lora.alpha": 2,
        "lora.scaling": "constant",
    }


class _Update:
    """One linear before and after: W [in, out], what was added, and A before and after."""

    def __init__(self, base: np.ndarray, change: np.ndarray, start: Any = None, a: Any = None):
        self.base, self.change, self.start, self.a = base, change, start, a


def _updates(cell: Cell, context: Context, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains, and gives the middle layer's linear that the cell names."""
    from qlora_jax.train.restore import restore

    folder = context.folder / f"{settings['method']}-{settings.get('lora.rank', '')}-{seed}"
    found = cells.finetuned(cell["config"], folder, {**settings, "train.seed": seed})
    before, after = (restore(found["run"], base=base, warn=print).model for base in (True, False))
    middle = before.config.num_layers // 2
    for (path, old, i), (_, new, _) in zip(before.walk(), after.walk()):
        if path.endswith(cell["module"]) and f".{middle}." in path:
            weight = np.asarray(old.weight.get_value()[i], np.float64)
            if new.adapter is None:
                moved = np.asarray(new.weight.get_value()[i], np.float64)
                return {cell["module"]: _Update(weight, moved - weight)}
            start, own = old.adapter.layer(i), new.adapter.layer(i)
            scale = float(new.adapter.scale.get_value()[i])
            change = scale * own.a.astype(np.float64) @ own.b.astype(np.float64)
            return {cell["module"]: _Update(weight, change, start.a, own.a)}
    raise ValueError(f"no linear {cell['module']} in layer {middle}")


def analyse(table: Table) -> Analysis:
    top = [row["small_large"][0][0] for row in table.rows]
    chance = [row["random"][0][0] for row in table.rows]
    above = difference(top, chance)
    rows = [
        {
            "module": module,
            "directions that hold 90% of a full fine-tune's ΔW": (
                f"{mean(own.column('rank_of_90')).mean:.0f} of {own.rows[0]['sides']}"
            ),
            f"φ(1,1), r {SMALL} in r {LARGE}": _phi(own, "small_large"),
            f"φ({SMALL},{SMALL})": _phi(own, "small_large", SMALL),
            "two seeds φ(1,1)": _phi(own, "seeds"),
            "A before and after φ(1,1)": _phi(own, "start"),
            "random φ(1,1)": _phi(own, "random"),
        }
        for (module,), own in table.groups("module").items()
    ]
    amplified = [
        {
            "module": module,
            "‖W‖": mean(own.column("weight")).mean,
            "‖ΔW‖": mean(own.column("update")).mean,
            "‖UᵀWVᵀ‖ of ΔW": mean(own.column("within_update")).mean,
            "of W": mean(own.column("within_weight")).mean,
            "of random": mean(own.column("within_random")).mean,
            "amplification": mean(own.column("factor")).mean,
        }
        for (module,), own in table.groups("module").items()
    ]
    return Analysis(
        Verdict(
            f"the first direction of A at r {SMALL} lies within that at r {LARGE} more than chance "
            f"by φ = {above}",
            above,
            within(above, low=0.0),
        ),
        {
            "Directions": markdown(rows),
            f"How ΔW relates to W (first {TOP} directions, r {LARGE}; LoRA Table 7: 21.5 at r 4, "
            "1.9 at r 64)": markdown(amplified),
        },
        {"subspaces": _heat(table), "singular_values": _spectrum(table)},
    )


def _phi(own: Table, name: str, i: int = 1) -> float:
    return mean([row[name][i - 1][i - 1] for row in own.rows]).mean


def _heat(table: Table) -> Figure:
    names = {
        "small_large": f"r {SMALL} in r {LARGE}",
        "seeds": f"r {LARGE}, two seeds",
        "random": "random",
    }
    modules = table.values("module")
    figure = Figure(figsize=(4 * len(names), 3.2 * len(modules)), layout="constrained")
    axes = figure.subplots(len(modules), len(names), squeeze=False)
    for line, module in zip(axes, modules):
        for ax, (name, title) in zip(line, names.items()):
            grids = [np.array(row[name]) for row in table.where(module=module).rows]
            shown = ax.imshow(np.mean(grids, axis=0), vmin=0, vmax=1, aspect="auto")
            ax.set_title(f"{module}: {title}")
            ax.set_xlabel("j")
            ax.set_ylabel("i")
    figure.colorbar(shown, ax=axes, label="φ(i, j)")
    return figure


def _spectrum(table: Table) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, ((module,), own) in enumerate(table.groups("module").items()):
        for name, style in (("singular_values", "-"), ("weight_values", ":")):
            values = np.mean([row[name] for row in own.rows], axis=0)
            label = f"{module}: {'ΔW' if style == '-' else 'W'}"
            axes.plot(values / values[0], style, color=f"C{i}", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("singular value")
    axes.set_ylabel("relative to the largest")
    axes.legend()
    return figure


EXPERIMENT = Experiment(
    name="intrinsic_rank",
    question="How many directions does fine-tuning move, and are they the same ones each time?",
    paper="LoRA, section 7: φ of the first direction of r 8 in r 64 above 0.5 (Fig. 3), random "
    "near 0 (Fig. 4); amplification 21.5 at r 4 and 1.9 at r 64 (Table 7)",
    expected="the first few directions recur; A's start at random stays visible in the rest",
    cost="about 10 minutes on 2 CPU cores, 2 GiB",
    axes={"config": [inputs.CONFIG], "module": ["q_proj", "v_proj"]},
    run=run,
    analyse=analyse,
)
