"""Writes the report of a run for its user: the loss curve, report.md and samples.md."""

import dataclasses
import itertools
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_jax.runtime.atomic import atomic_write, write_text
from qlora_jax.runtime.display import duration
from qlora_jax.runtime.streams import printable
from qlora_jax.train.choice import describe_patience
from qlora_jax.train.metrics import read_metrics

# blue and vermillion of Okabe and Ito: distinct under every common colour blindness
TRAIN_COLOUR = "#0072B2"
EVAL_COLOUR = "#D55E00"
# the same palette: one colour for each held-out set, in the order of the sets
SET_COLOURS = (EVAL_COLOUR, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_RING: Mapping[str, Any] = {"markersize": 13, "fillstyle": "none"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out prompt, its answer in the data, and the answers before and after training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetLoss:
    """The loss of a held-out set in nats per target token, and the number of target tokens."""

    before: float
    after: float
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The settings and results of a finished run, for its report and manifest."""

    model: str
    method: str
    """qlora, lora or full."""
    quantization: str
    """Description, e.g. `nf4, block 64, double quantization`; empty without quantization."""
    rank: int | None
    """Rank of the adapters; None if every weight is trained."""
    trainable: int
    """Number of trained parameters."""
    total: int
    """Number of all parameters, adapters included."""
    device: str
    base_hash: str
    """Hash of the frozen pretrained weights (`models.fingerprint`); empty if every weight is
    trained."""
    steps: int
    """Number of steps done."""
    planned_steps: int | None = None
    """Number of steps in the config; more than `steps` if the run stopped early. None in manifests
    of earlier versions."""
    exported_step: int | None = None
    """Step of the adapter, the samples and `eval_after`; None in manifests of earlier versions."""
    keep_best: bool = False
    """Whether the exported step is the one with the lowest held-out loss; False for the last."""
    patience: int = 0
    """Evaluations in a row without a lower held-out loss that stop the run; 0 never stops it."""
    skipped: int
    """Number of steps skipped because a gradient overflowed."""
    wall_s: float
    tokens: int
    """Number of tokens trained on, padding excluded."""
    tokens_per_s: float
    """Median over steps."""
    peak_rss_bytes: int
    peak_device_bytes: int | None = None
    """Peak memory of the first device; None if the backend does not report it, as on a CPU."""
    eval_before: float | None
    """Loss of the first held-out set before training, in nats per target token; None without
    held-out data."""
    eval_after: float | None
    eval_tokens: int
    """Number of target tokens in the first held-out set."""
    eval_sets: Mapping[str, SetLoss] = dataclasses.field(default_factory=dict)
    """Map from the name of a held-out set to its losses; empty if the only set has no name."""
    samples: Sequence[Sample]
    command: str
    """Command that reproduces the run."""
    run_dir: str


def read_summary(results: Mapping[str, Any], run_dir: str) -> RunSummary | None:
    """Returns the summary of a finished run without samples; None if its fields do not fit.

    Args:
      results: results in the run's manifest.
      run_dir: current run directory, which may differ from the one at training.
    """
    known = {field.name for field in dataclasses.fields(RunSummary)}
    values = {**results, "samples": [], "run_dir": run_dir}
    try:
        values["eval_sets"] = {k: SetLoss(**x) for k, x in values.get("eval_sets", {}).items()}
        return RunSummary(**values) if values.keys() <= known else None
    except (TypeError, AttributeError):
        return None


def describe_losses(summary: RunSummary) -> list[str]:
    """Returns a line for each held-out set, with its loss before and after training."""
    found = {name: (x.before, x.after) for name, x in summary.eval_sets.items()}
    if not found and summary.eval_before is not None and summary.eval_after is not None:
        found = {"": (summary.eval_before, summary.eval_after)}
    return [
        f"held-out loss{f' of {name}' if name else ''}: {before:.4f} before, {after:.4f} after "
        f"({_change(before, after)})"
        for name, (before, after) in found.items()
    ]


def describe_export(summary: RunSummary) -> str:
    """Returns a phrase on the exported step and the reason for its choice."""
    of = f"step {summary.exported_step:,} of {summary.planned_steps:,}"
    why = "the last one"
    if summary.keep_best:
        why = f"the lowest held-out loss, {summary.eval_after:.4f}"
    return f"{of}, {why}{describe_early(summary)}"


def describe_early(summary: RunSummary) -> str:
    """Returns a phrase, with a leading semicolon, on an early stop; empty without early stop."""
    if summary.planned_steps is None or summary.steps >= summary.planned_steps:
        return ""
    return f"; stopped early at step {summary.steps:,}, {describe_patience(summary.patience)}"


def write_report(summary: RunSummary) -> Path:
    """Writes loss_curve.png, samples.md and report.md into the run directory.

    Returns:
      The path of report.md.

    Raises:
      UserError: metrics.jsonl is missing or malformed, or the folder cannot be written to.
    """
    run_dir = Path(summary.run_dir)
    plot_loss(read_metrics(run_dir / "metrics.jsonl"), summary, run_dir / "loss_curve.png")
    write_samples(run_dir / "samples.md", summary.samples)
    write_text(run_dir / "report.md", _report(summary))
    return run_dir / "report.md"


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Writes the samples as markdown, escaped so that every character is displayed literally."""
    write_text(path, "# Samples\n\n" + _samples(samples))


def print_samples(console: Console, samples: Sequence[Sample]) -> None:
    """Prints the answers before and after training side by side, for each sample."""
    for sample in samples:
        table = Table(
            title=Text(printable(sample.prompt), style="bold"),
            title_justify="left",
            caption=Text(f"in the data: {printable(sample.reference)}"),
            caption_justify="left",
            expand=True,
        )
        table.add_column("before", ratio=1, overflow="fold")
        table.add_column("after", ratio=1, overflow="fold")
        table.add_row(Text(printable(sample.before)), Text(printable(sample.after)))
        console.print(table)
        console.print()


def plot_loss(metrics: Sequence[dict[str, Any]], summary: RunSummary, path: str | Path) -> None:
    """Draws training and held-out loss over steps into a PNG file.

    Args:
      metrics: rows of `read_metrics`, with `step` and `train/loss` or `eval/loss`.
      summary: summary of the run, for the title, the held-out sets and the exported step.
      path: path of the PNG file.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    shown: list[float] = []

    steps, losses = _series(metrics, "train/loss")
    if len(steps):
        window = _window(len(steps))
        smooth = running_mean(losses, window)
        label = f"training, mean of {window} steps" if window > 1 else "training"
        if window > 1:
            axes.plot(steps, losses, color=TRAIN_COLOUR, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=TRAIN_COLOUR, linewidth=2, label=label)
        shown += [*losses]

    for (name, label), colour in zip(_held_out(summary).items(), itertools.cycle(SET_COLOURS)):
        steps, losses = _series(metrics, name)
        if len(steps):
            axes.plot(steps, losses, "o-", color=colour, linewidth=1.2, markersize=6, label=label)
            shown += [*losses]
            _annotate(axes, steps, losses, colour)
            _mark_exported(axes, steps, losses, summary, colour)

    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if shown:
        low, high = _range(shown)
        axes.set_ylim(low, high)
        axes.legend(frameon=False, loc="upper right")
    axes.margins(x=0.02)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(summary), loc="left", fontsize=11, parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _held_out(summary: RunSummary) -> dict[str, str]:
    """Returns a map from the metric of each held-out loss to its label in the plot."""
    sets = {f"eval/{name}/loss": f"held out: {name}" for name in summary.eval_sets}
    return sets or {"eval/loss": "held out"}


def _annotate(axes: Axes, steps: np.ndarray, losses: np.ndarray, colour: str) -> None:
    """Writes the first and the last loss beside their points."""
    for index in {0, len(steps) - 1}:
        axes.annotate(
            f"{losses[index]:.2f}",
            (steps[index], losses[index]),
            xytext=(7 if index == 0 else 0, 8),
            textcoords="offset points",
            ha="left" if index == 0 else "right",
            color=colour,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _mark_exported(
    axes: Axes, steps: np.ndarray, losses: np.ndarray, summary: RunSummary, colour: str
) -> None:
    """Draws a ring around the loss of the exported step, if it is not the last step."""
    if summary.exported_step not in (None, summary.steps):
        found = losses[steps == summary.exported_step]
        axes.plot([summary.exported_step] * len(found), found, "o", **_RING, color=colour)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the centred mean over `window` values (odd); the window is shorter at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _window(count: int) -> int:
    return 1 if count < 10 else 2 * (min(count, 400) // 40) + 3


def _series(metrics: Iterable[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[name]) for r in metrics if math.isfinite(r.get(name, math.nan))]
    array = np.array(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), float(np.quantile(values, 0.99))
    high = max(high, values[-1], values[0])
    margin = 0.12 * (high - low) or 0.1
    return max(0.0, low - margin), high + margin


def _title(summary: RunSummary) -> str:
    model = summary.model if len(summary.model) <= 44 else "…" + summary.model[-43:]
    parts = [f"{model}: {summary.method}", summary.quantization]
    if summary.rank is not None:
        parts.append(f"rank {summary.rank}")
    change = ""
    if summary.eval_before is not None and summary.eval_after is not None:
        change = (
            f"\nheld-out loss {summary.eval_before:.2f} → {summary.eval_after:.2f} "
            f"({_change(summary.eval_before, summary.eval_after)})"
        )
    return ", ".join(p for p in parts if p) + change


def _report(summary: RunSummary) -> str:
    share = summary.trainable / summary.total
    known = summary.exported_step is not None
    exported = [("exported", describe_export(summary))] if known else []
    facts = [
        ("model", _escape(summary.model)),
        ("method", summary.method),
        (
            "frozen weights",
            summary.quantization or ("none" if summary.rank is None else "not quantized"),
        ),
        ("adapter rank", str(summary.rank) if summary.rank is not None else "no adapters"),
        ("trainable", f"{summary.trainable:,} of {summary.total:,} parameters ({share:.3%})"),
        ("device", _escape(summary.device)),
        ("optimizer steps", f"{summary.steps:,}" + _skipped(summary.skipped)),
        *exported,
        ("tokens trained on", f"{summary.tokens:,}"),
        ("time", f"{duration(summary.wall_s)} ({'h:mm:ss' if summary.wall_s >= 3600 else 'm:ss'})"),
        ("speed", f"{summary.tokens_per_s:,.0f} tokens/s, median over steps"),
        ("peak memory, process", f"{summary.peak_rss_bytes / 2**30:.2f} GiB"),
    ]
    if summary.peak_device_bytes is not None:
        facts.append(("peak memory, device", f"{summary.peak_device_bytes / 2**30:.2f} GiB"))
    if summary.base_hash:
        facts.append(("hash of the frozen weights", f"`{summary.base_hash}`"))
    table = "".join(f"| {name} | {value} |\n" for name, value in facts)
    prompt = summary.samples[0].prompt if summary.samples else "..."
    generate = f"qlora-jax generate {shlex.quote(summary.run_dir)} --prompt {shlex.quote(prompt)}"
    samples = f"## Samples\n\n{_samples(summary.samples)}" if summary.samples else ""
    return f"""# {_escape(_title(summary).splitlines()[0])}

{_losses(summary)}
![training and held-out loss over optimizer steps](loss_curve.png)

## What ran

| | |
|---|---|
{table}
Versions, flags and hashes are in [manifest.json](manifest.json), all settings in \
[config.yaml](config.yaml), all figures in [metrics.jsonl](metrics.jsonl).

{samples}## Again

Run it again:

{_fence(summary.command)}

Ask the trained model (add `--base` to ask the one before training):

{_fence(generate)}
"""


def _losses(summary: RunSummary) -> str:
    before, after = summary.eval_before, summary.eval_after
    if before is None or after is None:
        return "No examples were held out, so there is no loss before and after.\n"
    if summary.eval_sets:
        head = "held out"
        rows = [
            (f"{_escape(name)}, {x.tokens:,} target tokens: loss", x.before, x.after, ".4f")
            for name, x in summary.eval_sets.items()
        ]
    else:
        head = f"held out, {summary.eval_tokens:,} target tokens"
        rows = [("loss (nats per token)", before, after, ".4f")]
        rows.append(("perplexity", _exp(before), _exp(after), ",.2f"))
    lines = "".join(
        f"| {name} | {a:{form}} | {b:{form}} | {_change(a, b)} |\n" for name, a, b, form in rows
    )
    return f"| {head} | before | after | change |\n|---|---:|---:|---:|\n{lines}"


def _samples(samples: Sequence[Sample]) -> str:
    return "".join(
        f"### {number}\n\n| | |\n|---|---|\n"
        + "".join(
            f"| {name} | {_escape(text)} |\n"
            for name, text in (
                ("prompt", sample.prompt),
                ("in the data", sample.reference),
                ("before", sample.before),
                ("after", sample.after),
            )
        )
        + "\n"
        for number, sample in enumerate(samples, 1)
    )


def _escape(text: str) -> str:
    text = re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", text.replace("&", "&amp;").strip("\n"))
    text = re.sub(r"(?m)^[ \t]+", lambda m: "&nbsp;" * len(m[0].expandtabs(4)), text)
    return "<br>".join(text.splitlines())


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}\n{text}\n{ticks}"


def _skipped(count: int) -> str:
    return f", {count:,} of them skipped because a gradient overflowed" if count else ""


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else "n/a"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
