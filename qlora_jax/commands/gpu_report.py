"""The command `qlora-jax bench gpu`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.commands.common import count, say
from qlora_jax.runtime import paths
from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.errors import RunFailed, UserError, first_line

TEXT = "everything on this machine's GPU: check kernels, time products and steps, train runs"
DESCRIPTION = """Check and measure this package on this machine's GPU, and write a report.

Writes DIR/DEVICE.json, .md and .png; DEVICE is the GPU's name. The files contain no paths and no
host name. Each result is written to DIR/lines.jsonl at once, so that no result is lost if the
command is stopped; a second call with the same DIR adds its results."""
OUTPUT = Path("gpu_report")
SECONDS = 570
REHEARSAL_SECONDS = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench gpu` to its parser."""
    add = parser.add_argument
    add(
        "--rehearse",
        action="store_true",
        help="run everything on the CPU with tiny shapes, as a test",
    )
    add(
        "--budget",
        type=count,
        metavar="SECONDS",
        help=f"time limit for all parts; default {SECONDS}",
    )
    add(
        "--only",
        type=_names,
        default=(),
        metavar="PART,...",
        help="run only these parts; see --list",
    )
    add("--skip", type=_names, default=(), metavar="PART,...", help="run all parts except these")
    add("--list", action="store_true", help="only print the parts with their time limits")
    add(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help=f"folder of the files; default {OUTPUT}",
    )
    add(
        "--peer",
        action="append",
        default=[],
        metavar="PYTHON",
        help="Python interpreter with bitsandbytes and PEFT; default: the one of this command",
    )
    add(
        "--lines",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run no parts; make the report from the lines.jsonl of earlier calls",
    )


def run(options: argparse.Namespace, command: str) -> None:
    """Runs the parts, writes the report and prints it.

    Raises:
      UserError: a part is unknown, there is no GPU, or the folder cannot be written.
      RunFailed: a part failed; the message is the last line of the report.
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
    except Exception as e:  # a missing picture must not lose the report
        say(f"warning: the picture was not drawn: {first_line(e)}")
    print(json.dumps(made) if options.json else page.text(made))
    last = report.last_line(made, made["backend"] == "cpu")
    if report.failed(made):
        raise RunFailed(last)
    if not options.json:
        print(last)


def _names(text: str) -> Sequence[str]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
