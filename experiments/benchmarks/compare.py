"""Runs every benchmark for this library and installed peers; writes JSON, tables and a picture.

Question: how do speed and memory compare with bitsandbytes, PEFT, transformers and qwix on this
  machine?
Expected: the targets in docs/benchmarks.md.
Cost: about half an hour on 2 CPU cores with 3 rounds, 5 GB of memory. Each round is saved when it
  ends. If a run was stopped, or ended by --minutes, the same command continues it. Rounds that were
  measured with other code or other versions are measured again.
Command: python -m experiments.benchmarks.compare all --peer PYTHON [--peer PYTHON]
    --out docs/results/benchmarks-cpu-jax012.json [--page docs/benchmarks.md]
  The picture is OUT with the suffix .png. The tables replace the text of the page between
  `<!-- begin NAME -->` and `<!-- end NAME -->`; NAME is the file name of OUT without its suffix.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tools import pages
from qlora_jax.bench import plot, tools
from qlora_jax.bench.compare import round_of, summarize
from qlora_jax.bench.options import (
    GenerateOptions,
    KernelOptions,
    LoadOptions,
    Options,
    StepOptions,
    to_tree,
)
from qlora_jax.bench.table import remarks, table
from qlora_jax.bench.tools import Tool
from qlora_jax.commands.bench import with_model
from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.runtime.processes import code_digest

SMALL, LARGE = "random-smollm2-135m", "random-tinyllama-1.1b"


class Section(NamedTuple):
    """One table. `against`: label and options of a second run of ours, instead of peers."""

    title: str
    what: str
    options: Options
    against: tuple[str, Options] | None = None


SECTIONS = {
    "quantizer": Section(
        "Quantizing and decoding", "kernels", KernelOptions(operations=("quantize", "dequantize"))
    ),
    "forward": Section("x @ W", "kernels", KernelOptions(operations=("forward",))),
    "backward": Section("Its backward pass", "kernels", KernelOptions(operations=("backward",))),
    "step": Section("Training step, SmolLM2-135M's shape, 2 x 256", "step", StepOptions(SMALL)),
    "step-full": Section(
        "The same, recomputing everything", "step", StepOptions(SMALL, remat="full")
    ),
    "step-lora": Section(
        "QLoRA against our 16-bit LoRA",
        "step",
        StepOptions(SMALL),
        ("16-bit LoRA", StepOptions(SMALL, "lora")),
    ),
    "load": Section("Loading 1.1B parameters into NF4", "load", LoadOptions(LARGE)),
    "generate": Section(
        "Generation, SmolLM2-135M's shape in NF4, 34 + 64 tokens",
        "generate",
        GenerateOptions(SMALL),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections",
        nargs="+",
        choices=["all", *SECTIONS],
        metavar="SECTION",
        help=f"all, or any of {', '.join(SECTIONS)}",
    )
    parser.add_argument("--peer", action="append", default=[], metavar="PYTHON")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--page", type=Path, metavar="FILE.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no round after this many minutes"
    )
    options = parser.parse_args()
    chosen = SECTIONS if "all" in options.sections else {s: SECTIONS[s] for s in options.sections}
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    deadline = time.monotonic() + 60 * options.minutes
    for name, section in chosen.items():
        sides = _sides(section, options.peer)
        rounds = _kept(results.get(name), section, sides)
        _say(f"{name}: {len(rounds)} of {options.rounds} rounds are there")
        while len(rounds) < options.rounds and time.monotonic() < deadline:
            rounds.append(_round(section, sides))
            results[name] = {"what": section.what, "key": _key(section, sides), "rounds": rounds}
            _write(options.out, {n: results[n] for n in SECTIONS if n in results})
    _show(results, options.out, options.page)
    if left := [n for n in chosen if len(results.get(n, {}).get("rounds", ())) < options.rounds]:
        _say(f"not complete: {', '.join(left)}; run the same command to continue")


def _sides(section: Section, pythons: Sequence[str]) -> list[Tool]:
    """Returns our tool, and each peer of this section that one of the interpreters has."""
    found, errors = [tools.ours()], []
    if section.against is not None:
        return found
    for python in pythons:
        try:
            found += tools.peers(python, section.what)
        except UserError as e:
            errors.append(e)
    if errors and len(found) == 1:
        raise errors[0]
    return found


def _round(section: Section, sides: Sequence[Tool]) -> list[dict[str, Any]]:
    first = with_model(section.options, len(sides) > 1, _say)
    reports = round_of(sides, section.what, first, _say)
    if section.against is not None:
        label, other = section.against
        other = with_model(other, False, _say)
        reports.append(tools.measured(sides[0], section.what, other, _say) | {"label": label})
    named = getattr(section.options, "model", None)
    for report in reports:
        if "model" in report["options"]:
            report["options"]["model"] = named  # the name, not the path on this machine
    return reports


def _key(section: Section, sides: Sequence[Tool]) -> dict[str, Any]:
    """Returns the versions, sides and options that rounds must share to be combined."""
    return {
        "code": code_digest(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "sides": [side.name for side in sides],
        "options": to_tree(section.options),
    }


def _kept(
    result: Mapping[str, Any] | None, section: Section, sides: Sequence[Tool]
) -> list[list[dict[str, Any]]]:
    key = json.loads(json.dumps(_key(section, sides)))
    return list(result["rounds"]) if result and result["key"] == key else []


def _write(out: Path, results: Mapping[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()]
    write_text(out, "{\n" + ",\n".join(lines) + "\n}\n")


def _show(results: Mapping[str, Any], out: Path, page: Path | None) -> None:
    summaries = {n: summarize(results[n]["rounds"]) for n in SECTIONS if n in results}
    if not summaries:
        return
    parts = []
    for name, summary in summaries.items():
        notes = "\n".join(f"- {line}" for line in remarks(results[name]["rounds"]))
        parts.append(f"### {SECTIONS[name].title}\n\n{table(summary)}\n\n{notes}")
    text = "\n\n".join(parts)
    print(text)
    picture = out.with_suffix(".png")
    plot.save({SECTIONS[n].title: s for n, s in summaries.items()}, picture)
    if page is not None:
        link = f"![{out.stem}]({picture.relative_to(page.parent)})"
        write_text(page, replaced(page.read_text(), out.stem, f"{text}\n\n{link}"))


def replaced(page: str, name: str, text: str) -> str:
    """Returns the page with the text between the marks of `name` replaced.

    Raises:
      UserError: the page does not have each mark once, the end mark after the begin mark.
    """
    marks = pages.Marks(f"<!-- begin {name} -->", f"<!-- end {name} -->")
    try:
        return pages.replaced(page, marks, text)
    except ValueError:
        raise UserError(
            f"--page: it needs one line {marks.begin} and after it one {marks.end}"
        ) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, RunFailed) as e:
        sys.exit(f"compare.py: {e}")
