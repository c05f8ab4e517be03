"""Writes the results of several sweeps as one HTML page that needs no network."""

import base64
import os
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from qlora_jax.runtime import json_files, manifest, paths
from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep.conclude import PAGE, VERDICT
from qlora_jax.sweep.results import NAME, PARQUET

TEMPLATE = Path(__file__).with_name("report.html.jinja")
TITLE = "qlora_jax: the papers' questions"
FACTS = ("command", "cells", "seeds", "wall_s", "finished", "machine", "versions", "git")
"""Keys of a sweep's manifest that the page shows, if the manifest has them."""


class Section(NamedTuple):
    """One sweep's part of the page; `tables` is HTML, `pictures` maps file names to base64 text."""

    name: str
    question: str
    paper: str
    ours: str
    verdict: str
    tables: Markup
    pictures: dict[str, str]
    facts: dict[str, str]
    files: list[str]


def report(results: Path, page: Path, command: str) -> int:
    """Writes the page and returns the number of sweeps on it.

    Args:
      results: folder of one sweep, or a folder that contains the folders of sweeps.
      page: file to write.
      command: command line that made the page, shown at its foot.

    Raises:
      UserError: the folder contains no finished sweep, a sweep is damaged, or the page cannot be
        written.
    """
    folders = sorted(path.parent for path in results.glob(f"**/{VERDICT}"))
    if not folders:
        raise UserError(f"{results}: no finished sweep in it; run qlora-jax sweep NAME first")
    sections = [section(folder, page.parent) for folder in folders]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, template.render(title=TITLE, sections=sections, command=command))
    return len(sections)


def section(folder: Path, beside: Path) -> Section:
    """Reads the folder of a sweep and returns its part of the page.

    Args:
      folder: folder of the sweep.
      beside: folder of the page; links are relative to this folder.

    Raises:
      UserError: the verdict cannot be read, or is incomplete.
    """
    verdict = _json(folder / VERDICT)
    made = _json(folder / manifest.NAME) if paths.is_file(folder / manifest.NAME) else {}
    files = [folder / name for name in (NAME, PARQUET, PAGE) if paths.is_file(folder / name)]
    try:
        return Section(
            name=verdict["experiment"],
            question=verdict["question"],
            paper=verdict["paper"],
            ours=verdict["ours"],
            verdict=verdict["verdict"],
            tables=_tables(folder / PAGE),
            pictures={
                path.name: base64.b64encode(path.read_bytes()).decode()
                for path in sorted(folder.glob("*.png"))
            },
            facts={key: _shown(made[key]) for key in FACTS if made.get(key) is not None},
            files=[os.path.relpath(file, beside) for file in files],
        )
    except KeyError as e:
        raise UserError(
            f"{folder / VERDICT}: {e.args[0]} is missing; run the sweep with --analyse-only again"
        ) from None


def _tables(page: Path) -> Markup:
    """Returns the HTML of a sweep's page from its first table on, without the pictures."""
    text = page.read_text(encoding="utf-8") if paths.is_file(page) else ""
    _, found, rest = text.partition("\n## ")
    kept = [line for line in ("## " + rest).splitlines() if not line.startswith("![")]
    html = MarkdownIt("commonmark").enable("table").render("\n".join(kept) if found else "")
    html = html.replace("<h2>", "<h3>").replace("</h2>", "</h3>")
    html = html.replace("<table>", '<div class="scroll"><table>')
    return Markup(html.replace("</table>", "</table></div>"))


def _json(path: Path) -> dict[str, Any]:
    return json_files.read_object(path, "run the sweep with --analyse-only again")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.0f}" if isinstance(value, float) else str(value)
