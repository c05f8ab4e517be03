"""Draws plans as stacked bars, one for each GPU, with a line at the usable memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax.runtime.errors import UserError

GIB = 2**30
COLORS = {
    "frozen weights": "#4c72b0",
    "adapters": "#55a868",
    "gradients": "#c44e52",
    "moments": "#8172b3",
    "temporaries": "#dd8452",
}


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the plans of one run on several GPUs, and writes the picture.

    Args:
      rows: plan of each GPU as plain values, from `commands.plan.describe`.
      path: file to write.

    Raises:
      UserError: the file cannot be written.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7.5, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    widest = 1.35 * max(row["device_gib"] for row in rows)
    for place, row in enumerate(rows):
        left = 0.0
        for name, color in COLORS.items():
            width = row["stack"].get(name, 0) / GIB
            axes.barh(place, width, left=left, color=color, label=name if not place else None)
            left += width
        limit = row["limit_gib"]
        if limit < widest:
            axes.plot(2 * [limit], [place - 0.45, place + 0.45], color="black", linewidth=2)
        verdict = "fits" if row["fits"] else "does not fit"
        label = f"  {left:.1f} of {limit:.1f}, {verdict}"
        axes.text(left, place, label, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["gpu"] for row in rows])
    axes.set_xlabel("GiB on the device; black: what a run may use")
    axes.set_title(rows[0]["title"], fontsize=10)
    axes.set_xlim(0, widest)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(COLORS), fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise UserError(
            f"--plot {path}: cannot be written: {e.strerror}; give another file"
        ) from None
