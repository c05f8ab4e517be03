"""Draws the outcomes: one square for each conversation under each template."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from chats.judge import NO_TEXT, REFUSED, RIGHT, VERDICTS, WRONG, Outcome

COLOURS = {RIGHT: "#4c9f70", REFUSED: "#e0b040", WRONG: "#c0392b", NO_TEXT: "#e4e4e4"}


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes a PNG with conversations as rows and templates as columns."""
    templates = list(dict.fromkeys(o.template for o in outcomes))
    cases = list(dict.fromkeys(o.case for o in outcomes))
    verdicts = {(o.case, o.template): VERDICTS.index(o.verdict) for o in outcomes}
    squares = [[verdicts[case, template] for template in templates] for case in cases]
    figure = Figure(
        figsize=(2.6 + 0.32 * len(templates), 2.2 + 0.27 * len(cases)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.pcolormesh(
        squares,
        cmap=ListedColormap([COLOURS[v] for v in VERDICTS]),
        vmin=-0.5,
        vmax=len(VERDICTS) - 0.5,
        edgecolors="white",
        linewidth=1.5,
    )
    axes.set_xticks([i + 0.5 for i in range(len(templates))], templates, rotation=90, fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(cases))], cases, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    counts = {v: sum(o.verdict == v for o in outcomes) for v in VERDICTS}
    handles = [Patch(color=COLOURS[v], label=f"{v}: {counts[v]}") for v in VERDICTS]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
