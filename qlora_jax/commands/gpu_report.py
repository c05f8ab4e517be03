"""`qlora-jax bench gpu`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.commands.common import count, say
from qlora_jax.runtime import paths
from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.errors import RunFailed, UserError, first_line

TEXT = "everything on the GPU at hand: kernels checked, products and steps timed, runs trained"
DESCRIPTION = """Check, measure and report what this package does on the GPU at hand.

Writes DIR/DEVICE.json, .md and .png; DEVICE is the GPU's name. The files hold no paths and no
host's name. Results are written at once to DIR/lines.jsonl, so that nothing is lost where it is
ended; a second call with the same DIR adds to them."""
OUTPUT = Path("gpu_report")
SECONDS = 570
REHEARSAL_SECONDS = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--rehearse", action="store_true", help="tiny shapes on the CPU: does everything run?")
    add("--budget", type=count, metavar="SECONDS", help=f"for all; default {SECONDS}")
    add("--only", type=_names, default=(), metavar="PART,...", help="these parts; see --list")
    add("--skip", type=_names, default=(), metavar="PART,...", help="all parts but these")
    add("--list", action="store_true", help="print the parts with their limits, and end")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help=f"default {OUTPUT}")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="PYTHON",
        help="interpreter that has bitsandbytes and PEFT; default: the one that runs this",
    )
    add(
        "--lines",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing; make the report from the lines.jsonl of earlier calls",
    )


def run(options: argparse.Namespace, command: str) -> None:
    """Runs the parts, writes the report and prints it.

    Raises:
      UserError: unknown parts, no GPU, or a folder that cannot be written to.
      RunFailed: a part failed; the message is the report's last line.
    """
    from qlora_jax.bench.gpu import conduct, lane, page, parts, record, report
    from qlora_jax.runtime.device import has_nvidia_gpu

    names = [part.name for part in parts.PARTS]
    for name in (*options.only, *options.skip):
        if name not in names:
            raise UserError(f"--only or --skip {name}: no such part; there are: {', '.join(names)}")
    chosen = parts.chosen(options.only, options.skip)
    if options.list:
        for part in chosen:
            print(f"{part.name:10} at most {part.limit:4} s  {part.what}")
        return
    if options.lines is None:
        if not options.rehearse and not has_nvidia_gpu():
            raise UserError("no NVIDIA GPU is here; --rehearse runs tiny shapes on the CPU instead")
        scale = lane.REHEARSAL if options.rehearse else lane.FULL
        budget = options.budget or (REHEARSAL_SECONDS if options.rehearse else SECONDS)
        peers = options.peer or [sys.executable]
        conduct.run(conduct.BenchRequest(chosen, scale, budget, options.output, peers), say)
    files = options.lines or [options.output / conduct.LINES]
    for file in files:
        if not paths.is_file(file):
            raise UserError(
                f"--lines {file}: no such file; give one that an earlier bench gpu wrote"
            )
    made = report.build(record.read(files), record.without_folders(command))
    if "device" not in made:
        raise UserError(f"{files[0]}: holds no device; run the part {names[0]} first")
    name = "rehearsal" if made["backend"] == "cpu" else report.slug(made["device"])
    options.output.mkdir(parents=True, exist_ok=True)
    whole = options.output / name
    write_text(whole.with_suffix(".json"), json.dumps(made, indent=1) + "\n")
    write_text(whole.with_suffix(".md"), page.text(made))
    try:
        page.picture(made, whole.with_suffix(".png"))
    except Exception as e:  # the figures are worth more than their picture
        say(f"warning: the picture was not drawn: {first_line(e)}")
    print(json.dumps(made) if options.json else page.text(made))
    last = report.last_line(made, made["backend"] == "cpu")
    if report.failed(made):
        raise RunFailed(last)
    if not options.json:
        print(last)


def _names(text: str) -> Sequence[str]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
