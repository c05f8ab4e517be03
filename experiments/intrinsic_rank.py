"""Measures how many directions fine-tuning changes, and whether other runs change the same ones.

qlora-jax sweep intrinsic_rank
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Column, Metric, average, columns, lines, measured
from qlora_jax.sweep.statistics import difference, mean, within

SMALL, LARGE = 8, 64
MODULES = ("q_proj", "v_proj")
"""Linears that are analysed, in the middle layer (the LoRA paper takes layer 48 of 96)."""

TOP = 4
"""Number of directions in the amplification table."""

PUBLISHED = 0.5
"""Lower bound that the LoRA paper reports for φ(1,1) of r 8 in r 64 (section 7.2)."""


def run(cell: Cell, context: Context) -> Rows:
    seed = cell["seed"]
    runs = {
        "full": _updates(cell, context, _FULL, seed),
        "small": _updates(cell, context, _lora(SMALL), seed),
        "large": _updates(cell, context, _lora(LARGE), seed),
        "again": _updates(cell, context, _lora(LARGE), seed + 1000),
    }

    def figures(module: str) -> dict[str, Any]:
        updates = {name: by_module[module] for name, by_module in runs.items()}
        return measured(METRICS, _trained(seed, **updates))

    return [{"module": module, **figures(module)} for module in MODULES]


_FULL = {"method": "full", "optimizer.learning_rate": inputs.FULL_RATE}


def _lora(rank: int) -> dict[str, Any]:
    return {
        "method": "lora",
        "optimizer.learning_rate": inputs.LOW_RANK_RATE,
        "lora.rank": rank,
        "lora.alpha": 2,
        "lora.scaling": "constant",
    }


class _Update(NamedTuple):
    """One linear before and after training.

    Attributes:
      base: W before training, [in, out].
      change: ΔW, [in, out]: the change of W, or s·A·B of the adapter.
      start: A before training, [in, r]; None if W itself was trained.
      a: A after training, [in, r]; None if W itself was trained.
    """

    base: np.ndarray
    change: np.ndarray
    start: Any = None
    a: Any = None


class _Trained(NamedTuple):
    """Updates of one linear by full fine-tuning and by adapters of two ranks and two seeds.

    Attributes:
      full: update by full fine-tuning.
      small: update by an adapter of rank `SMALL`.
      large: update by an adapter of rank `LARGE`.
      again: update by an adapter of rank `LARGE` from another seed.
      noise: two random matrices of the shape of A at rank `LARGE`.
      spectrum: singular values of the ΔW of `full`.
      amplified: relation of the ΔW of `large` to W, a `lora.analysis.Amplification`.
    """

    full: _Update
    small: _Update
    large: _Update
    again: _Update
    noise: tuple[np.ndarray, np.ndarray]
    spectrum: np.ndarray
    amplified: Any


def _trained(seed: int, full: _Update, small: _Update, large: _Update, again: _Update) -> _Trained:
    from qlora_jax.lora.analysis import amplification, singular_values

    random = np.random.default_rng(seed)
    first, second = (random.normal(size=large.a.shape) for _ in range(2))
    return _Trained(
        full,
        small,
        large,
        again,
        noise=(first, second),
        spectrum=singular_values(full.change),
        amplified=amplification(full.base, large.change, TOP, seed),
    )


def weight_values(trained: _Trained) -> list[float]:
    """Returns the singular values of W."""
    from qlora_jax.lora.analysis import singular_values

    return singular_values(trained.full.base).round(4).tolist()


def rank_of_90(trained: _Trained) -> int:
    """Returns the number of directions that hold 90% of the energy of full fine-tuning's ΔW."""
    from qlora_jax.lora.analysis import rank_of_energy

    return rank_of_energy(trained.spectrum, 0.9)


def _grid(a: np.ndarray, b: np.ndarray, size: tuple[int, int] = (LARGE, LARGE)) -> list[Any]:
    """Returns φ(i, j) of the leading directions of two matrices, up to `size`.

    φ of A includes what A was before training; φ of ΔW does not.
    """
    from qlora_jax.lora.analysis import subspace_similarity

    return subspace_similarity(a, b)[: size[0], : size[1]].round(4).tolist()


METRICS: Mapping[str, Metric[_Trained]] = {
    "singular_values": Metric(lambda x: x.spectrum.round(4).tolist()),
    "weight_values": Metric(weight_values),
    "rank_of_90": Metric(rank_of_90),
    "sides": Metric(lambda x: min(x.full.change.shape)),
    "small_large": Metric(lambda x: _grid(x.small.a, x.large.a)),
    "seeds": Metric(lambda x: _grid(x.large.a, x.again.a)),
    "random": Metric(lambda x: _grid(*x.noise)),
    "change": Metric(lambda x: _grid(x.small.change, x.large.change, (SMALL, LARGE))),
    "change_seeds": Metric(lambda x: _grid(x.large.change, x.again.change, (1, 1))),
    "start": Metric(lambda x: _grid(x.large.start, x.large.a, (1, 1))),
    "within_update": Metric(lambda x: x.amplified.within_update, "‖UᵀWVᵀ‖ of ΔW", average),
    "within_weight": Metric(lambda x: x.amplified.within_weight, "of W", average),
    "within_random": Metric(lambda x: x.amplified.within_random, "of random", average),
    "weight": Metric(lambda x: x.amplified.weight, "‖W‖", average),
    "update": Metric(lambda x: x.amplified.update, "‖ΔW‖", average),
    "factor": Metric(lambda x: x.amplified.factor, "amplification", average),
}
"""Figures of a linear; those with a title are columns of the table that relates ΔW to W."""

LEADING = ("weight", "update")
"""Names of the metrics whose columns come first."""


def _updates(
    cell: Cell, context: Context, settings: dict[str, Any], seed: int
) -> dict[str, _Update]:
    """Trains a run; returns the updates of the linears of `MODULES` in the middle layer."""
    from qlora_jax.train.restore import restore

    folder = context.folder / f"{settings['method']}-{settings.get('lora.rank', '')}-{seed}"
    cells.finetuned(cell["config"], folder, {**settings, "train.seed": seed})
    run = folder / cells.RUN
    before, after = (restore(run, base=base, warn=print).model for base in (True, False))
    middle = f".{before.config.num_layers // 2}."
    return {
        path.rpartition(".")[2]: _update(old, new, i)
        for (path, old, i), (_, new, _) in zip(before.walk(), after.walk())
        if middle in path and path.endswith(MODULES)
    }


def _update(old: Any, new: Any, layer: int) -> _Update:
    weight = np.asarray(old.weight.get_value()[layer], np.float64)
    if new.adapter is None:
        moved = np.asarray(new.weight.get_value()[layer], np.float64)
        return _Update(weight, moved - weight)
    start, own = old.adapter.weights(layer), new.adapter.weights(layer)
    scale = float(new.adapter.scale.get_value()[layer])
    change = scale * own.a.astype(np.float64) @ own.b.astype(np.float64)
    return _Update(weight, change, start.a, own.a)


def _phi(figure: str, i: int = 1) -> Column:
    """Returns a column of the mean of φ(i, i)."""
    return lambda rows: mean([row[figure][i - 1][i - 1] for row in rows.rows]).mean


def _directions(rows: Table) -> str:
    return f"{mean(rows.column('rank_of_90')).mean:.0f} of {rows.rows[0]['sides']}"


DIRECTIONS: Mapping[str, Column] = {
    "directions that hold 90% of a full fine-tune's ΔW": _directions,
    f"φ(1,1), r {SMALL} in r {LARGE}": _phi("small_large"),
    f"φ({SMALL},{SMALL})": _phi("small_large", SMALL),
    "two seeds φ(1,1)": _phi("seeds"),
    "A before and after φ(1,1)": _phi("start"),
    "random φ(1,1)": _phi("random"),
    f"ΔW φ(1,1), r {SMALL} in r {LARGE}": _phi("change"),
    "ΔW of two seeds φ(1,1)": _phi("change_seeds"),
}
"""Columns of the table of directions."""


def analyse(table: Table) -> Analysis:
    top = [row["small_large"][0][0] for row in table.rows]
    chance = [row["random"][0][0] for row in table.rows]
    first, above = mean(top), difference(top, chance)
    amplified = columns(METRICS, LEADING)
    return Analysis(
        Verdict(
            f"the first direction of A at r {SMALL} lies within that at r {LARGE} by φ(1,1) = "
            f"{first}, more than random ones by {above}",
            first,
            within(first, low=PUBLISHED),
        ),
        {
            "Directions": markdown(lines(table, ["module"], DIRECTIONS)),
            f"How ΔW relates to W (first {TOP} directions, r {LARGE}; LoRA Table 7: 21.5 at r 4, "
            "1.9 at r 64)": markdown(lines(table, ["module"], amplified)),
        },
        {"subspaces": _heat(table), "singular_values": _spectrum(table)},
    )


def _heat(table: Table) -> Figure:
    names = {
        "small_large": f"A, r {SMALL} in r {LARGE}",
        "change": f"ΔW, r {SMALL} in r {LARGE}",
        "seeds": f"A, r {LARGE}, two seeds",
        "random": "random",
    }
    modules = table.values("module")
    figure = Figure(figsize=(4 * len(names), 3.2 * len(modules)), layout="constrained")
    axes = figure.subplots(len(modules), len(names), squeeze=False)
    for line, module in zip(axes, modules):
        for ax, (name, title) in zip(line, names.items()):
            grids = [np.array(row[name]) for row in table.where(module=module).rows]
            phi = np.mean(grids, axis=0)
            ends = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
            shown = ax.imshow(phi, vmin=0, vmax=1, aspect="auto", extent=ends)
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
    cost="2 CPU cores, 2 GiB",
    axes={"config": [inputs.CONFIG]},
    version=2,
    inputs=inputs.made,
    estimate=costs.by("config", {inputs.CONFIG: 38}, 2),
    run=run,
    analyse=analyse,
)
