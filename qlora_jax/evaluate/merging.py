"""Measures the cost of merging an adapter: per linear, and in the predictions of each way."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import Config, QuantConfig
from qlora_jax.data.loader import held_out_batches
from qlora_jax.evaluate.divergence import Divergence, divergence, see
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.load import load_model
from qlora_jax.formats.merged import MergedCheckpoint
from qlora_jax.quant import dequantize, quantize, to_float32
from qlora_jax.quant.qtensor import block_scales
from qlora_jax.train.examples import read_data
from qlora_jax.train.quantization import describe_quantization
from qlora_jax.train.restore import Restored

NAME = "merge_report"
ROUTES = {
    "live": "the base as it was trained on, with the adapter beside it",
    "merged": "that base + Δ",
    "original": "the checkpoint's own weights + Δ",
    "requantized": "that base + Δ, in 4 bits again",
}

Counted = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]
"""Shows the progress over a number of items of similar size, as `runtime.display.counted` does."""


@contextlib.contextmanager
def _silent(description: str, total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclasses.dataclass(frozen=True)
class Share:
    """The change Δ of one linear's weight W, compared with the 4-bit rounding of W + Δ.

    With Q(W + Δ) the dequantized 4-bit weight:

    Attributes:
      module: Hugging Face path of the linear.
      delta: Frobenius norm ‖Δ‖.
      relative: ‖Δ‖ / ‖W‖.
      steps: mean |Δ| divided by the mean distance between neighbouring codes.
      kept: share of Δ that remains after rounding, ⟨Q(W + Δ) − W, Δ⟩ / ‖Δ‖².
      noise: error of the rounding, ‖Q(W + Δ) − (W + Δ)‖ / ‖Δ‖.
    """

    module: str
    delta: float
    relative: float
    steps: float
    kept: float
    noise: float


@dataclasses.dataclass(frozen=True)
class Route:
    """A way to run the trained model; `kl` is KL(live || this way), in nats per target token."""

    name: str
    kl: float
    loss: float
    perplexity: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The measured cost of merging; `quantization` describes the format of the 4-bit rounding.

    `routes` is empty without held-out data.
    """

    run: str
    dtype: str
    quantization: str
    routes: list[Route]
    shares: list[Share]


def compare(
    run: str,
    restored: Restored,
    checkpoint: Checkpoint,
    quant: QuantConfig,
    dtype: str,
    rows: int,
    counted: Counted = _silent,
) -> MergeReport:
    """Measures every way to merge the adapter of a run.

    Args:
      run: run directory, for the report.
      restored: trained model of the run.
      checkpoint: pretrained model of the run.
      quant: quantization of the requantized way.
      dtype: dtype of the merged weights that are not in 4 bits.
      rows: largest number of held-out rows.
      counted: function (description, items) -> context manager; the context yields a function to
        call once per item.
    """
    config, model = restored.config, restored.model
    data = read_data(config, restored.tokenizer, model.config.longest_cached)
    batches = held_out_batches(
        next(iter(data.held_out.values()), []),
        config.data,
        config.train.batch_size,
        rows,
        restored.tokenizer.pad_id,
    )
    own = MergedCheckpoint(model, checkpoint)
    ways: dict[str, Callable[[], Any]] = {
        "merged": lambda: load_model(own, quant=None, dtype=jnp.dtype(dtype)),
    }
    if has_original(config, checkpoint):
        original = MergedCheckpoint(model, checkpoint, original=True)
        ways["original"] = lambda: load_model(original, quant=None, dtype=jnp.dtype(dtype))
    ways["requantized"] = lambda: load_model(own, quant=quant, dtype=jnp.dtype(dtype))
    routes = []
    if batches:
        compute = jnp.dtype(config.model.compute_dtype)
        with counted("comparing", len(batches) * (1 + len(ways))) as advance:
            live = see(model, batches, compute, advance)
            routes.append(_route("live", divergence(live, live)))
            for name, make in ways.items():
                seen = see(make(), batches, compute, advance)
                routes.append(_route(name, divergence(live, seen)))
                del seen  # so that only one model exists beside the live one
    return MergeReport(
        run, dtype, describe_quantization(quant), routes, shares(model, quant, counted)
    )


def has_original(config: Config, checkpoint: Checkpoint) -> bool:
    """Returns whether the checkpoint holds weights without the rounding of the training base."""
    return config.method != "full" and checkpoint.quantization is None


def _route(name: str, found: Divergence) -> Route:
    return Route(name, found.kl, found.loss, found.perplexity, found.tokens)


def shares(model: Any, quant: QuantConfig, counted: Counted = _silent) -> list[Share]:
    """Returns the `Share` of each linear with an adapter, in the order of the layers."""
    adapted = [
        (path, linear, i)
        for path, linear, i in model.walk()
        if linear.adapter is not None and linear.adapter.spec(i) is not None
    ]
    found = []
    with counted("measuring what rounding keeps", len(adapted)) as advance:
        for path, linear, i in adapted:
            plain = to_float32(linear.weight.get_value()[i])
            values = _share(
                plain,
                linear.adapter.weight_update(plain, i),
                quant.codebook,
                quant.block_size,
                quant.double_quant,
                quant.nested_block,
            )
            found.append(Share(path, *(float(v) for v in values)))
            advance()
    return found


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _share(
    weight: jax.Array,
    change: jax.Array,
    codebook: str,
    block_size: int,
    double_quant: bool,
    nested_block: int,
) -> tuple[jax.Array, ...]:
    whole = weight + change
    q = quantize(whole, codebook, block_size, double_quant, nested_block)
    rounded = dequantize(q)
    norm = jnp.linalg.norm(change)
    step = jnp.mean(block_scales(q)) * 2 / 15
    safe = jnp.where(norm > 0, norm, 1)
    return (
        norm,
        norm / jnp.linalg.norm(weight),
        jnp.mean(jnp.abs(change)) / step,
        jnp.sum((rounded - weight) * change) / safe**2,
        jnp.linalg.norm(rounded - whole) / safe,
    )


def by_kind(shares: Sequence[Share]) -> list[tuple[str, int, Mapping[str, float]]]:
    """Returns, for each kind of linear, its name, the number of linears and their mean figures."""
    kinds: dict[str, list[Share]] = {}
    for share in shares:
        kinds.setdefault(share.module.rpartition(".")[2], []).append(share)
    fields = [f.name for f in dataclasses.fields(Share)][1:]
    return [
        (kind, len(own), {f: float(np.mean([getattr(s, f) for s in own])) for f in fields})
        for kind, own in kinds.items()
    ]


def tables(report: MergeReport) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns title, columns and rows of each table in a report."""
    routes = [
        [r.name, f"{r.kl:.3g}", f"{r.loss:.4f}", f"{r.perplexity:.4f}"] for r in report.routes
    ]
    linears = [
        [
            kind,
            str(count),
            f"{m['delta']:.3g}",
            f"{m['relative']:.2%}",
            f"{m['steps']:.3g}",
            f"{m['kept']:.0%}",
            f"{m['noise']:.2f}",
        ]
        for kind, count, m in by_kind(report.shares)
    ]
    tokens = f"{report.routes[0].tokens:,} held-out target tokens" if routes else ""
    found = [
        (
            f"Ways to run it, on {tokens}",
            ["way", "KL from live", "loss", "perplexity"],
            routes,
        ),
        (
            f"Δ against {report.quantization}, means over layers",
            ["linear", "layers", "‖Δ‖", "‖Δ‖/‖W‖", "mean abs Δ / step", "kept", "noise/‖Δ‖"],
            linears,
        ),
    ]
    return [table for table in found if table[2]]


EXPLANATION = """\
KL and loss are in nats per token. step: the mean distance between neighbouring codes,
absmax · 2/15. kept: what is left of Δ once W + Δ is rounded to 4 bits, its component along Δ; 100%
is all of it. noise: the norm of that rounding's error. Where a change is smaller than a step most
of it is rounded away and what is left is noise, so a merged model is best kept in 16 bits.
"""


def write_report(report: MergeReport, folder: Path) -> None:
    """Writes merge_report.md, .json and .png.

    Raises:
      OSError: the folder cannot be written to.
    """
    lines = [f"# Merging {report.run}", ""]
    for title, columns, rows in tables(report):
        lines += [f"## {title}", "", _row(columns), _row(["---"] * len(columns))]
        lines += [*map(_row, rows), ""]
    lines += [f"- {r.name}: {ROUTES[r.name]}" for r in report.routes]
    lines += ["", EXPLANATION, f"![Merging]({NAME}.png)", ""]
    (folder / f"{NAME}.md").write_text("\n".join(lines), encoding="utf-8")
    figures = json.dumps(dataclasses.asdict(report), indent=1) + "\n"
    (folder / f"{NAME}.json").write_text(figures, encoding="utf-8")
    _draw(report, folder / f"{NAME}.png")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw(report: MergeReport, path: Path) -> None:
    import matplotlib.figure

    panels = bool(report.routes) + 2 * bool(report.shares)
    figure = matplotlib.figure.Figure(figsize=(4 * max(panels, 1), 3.8), layout="constrained")
    axes = list(figure.subplots(1, max(panels, 1), squeeze=False)[0])
    if report.routes:
        _draw_routes(axes.pop(), report.routes)
    kinds: dict[str, list[Share]] = {}
    for share in report.shares:
        kinds.setdefault(share.module.rpartition(".")[2], []).append(share)
    panel_titles = ("mean |Δ| in steps between codes", "% of Δ left after rounding to 4 bits")
    for panel, title, field, times in zip(axes, panel_titles, ("steps", "kept"), (1, 100)):
        for kind, own in kinds.items():
            layers = [int(s.module.split(".")[2]) for s in own]
            values = [times * getattr(s, field) for s in own]
            panel.plot(layers, values, marker=".", linewidth=1, label=kind)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]), top=1.05 * panel.get_ylim()[1])
    if kinds:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_routes(axes: Any, routes: Sequence[Route]) -> None:
    others = [r for r in routes if r.name != "live"]
    axes.barh([r.name for r in others], [r.kl for r in others], color="#4c72b0")
    for place, route in enumerate(others):
        axes.text(route.kl, place, f" {route.kl:.2g}", va="center", fontsize=8)
    axes.set_xlim(0, 1.35 * max(r.kl for r in others) or 1)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    axes.set_title("KL from the live model (nats per token)", fontsize=10)
    axes.invert_yaxis()
