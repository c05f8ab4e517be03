"""`qlora-jax sweep`."""

import argparse
import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.commands.common import count, say
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.sweep.experiment import Cell, Experiment
from qlora_jax.sweep.find import find, load, where, with_axes
from qlora_jax.sweep.inputs import make, missing

TEXT = "Run an experiment's grid of cells, and say what it means for the paper's claim."
FOLDER = Path("runs") / "sweeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sweep`."""
    parser.epilog = "The same command goes on where a sweep was stopped; docs/experiments.md."
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a name, or a .py file")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,VALUE]",
        help="only cells that have one of the values; may be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,VALUE]",
        help="other values on an axis, such as config=configs/rank.yaml; may be repeated",
    )
    parser.add_argument("--seeds", type=_seeds, metavar="0,1,2", help="instead of its own")
    parser.add_argument("--jobs", type=count, metavar="N", help="cells at a time; default 1")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {FOLDER}/NAME")
    parser.add_argument(
        "--engine", choices=["local", "ray", "slurm"], default="local", help="what runs the cells"
    )
    parser.add_argument(
        "--resource",
        action="append",
        default=[],
        type=_resource,
        metavar="NAME=VALUE",
        help="of a cell, for ray (num_gpus=1) or slurm (slurm_partition=gpu); may be repeated",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="list the cells and their cost")
    only.add_argument("--analyse-only", action="store_true", help="analyse what is there")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers as 0,1,2, not {text!r}") from None


def _resource(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, not {text!r}")
    try:
        return name, json_files.parse(value)
    except ValueError:
        return name, value


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Runs what is left, and prints the verdict.

    Raises:
      UserError: the experiment, a condition or the folder cannot be used.
      RunFailed: cells failed, the analysis, or what makes an input.
    """
    path = find(options.experiment)
    experiment = with_axes(load(path), options.set)
    cells = where(experiment.cells(options.seeds), options.where)
    out = options.out or FOLDER / experiment.name
    if options.resource and options.engine == "local":
        raise UserError(
            "--resource: engine local takes none; leave it out, or give another --engine"
        )
    if options.dry_run:
        _show_plan(experiment, cells, out, options)
        return
    if not options.analyse_only:
        _make_inputs(experiment, cells, out, options.retry_failed)
    from qlora_jax.sweep.conclude import conclude
    from qlora_jax.sweep.record import FAILED
    from qlora_jax.sweep.results import read
    from qlora_jax.sweep.run import sweep

    if options.analyse_only:
        records = read(out, experiment)
    else:
        records = sweep(
            path,
            experiment,
            cells,
            out,
            command=command,
            engine=options.engine,
            jobs=options.jobs,
            resources=dict(options.resource),
            retry_failed=options.retry_failed,
        )
    verdict = conclude(experiment, records, out)
    states = collections.Counter(records[c.id].status for c in cells if c.id in records)
    if options.json:
        print(json.dumps({"out": str(out), "cells": states, "verdict": verdict}))
    elif verdict:
        print((out / "analysis.md").read_text(encoding="utf-8"))
        print(f"{_counted(states)}; results: {out}")
    if states[FAILED]:
        raise RunFailed(
            f"{states[FAILED]} of {len(cells)} cells failed (see {out}/results.jsonl); "
            "--retry-failed runs them again"
        )


class _Plan(NamedTuple):
    """The cells that are asked for, with their records and which are still to run.

    Attributes:
      records: by cell.
      reasons: why cells cannot run, by cell.
      todo: the cells that are to run.
    """

    records: Mapping[str, Any]
    reasons: Mapping[str, str]
    todo: Sequence[Cell]


def _plan(experiment: Experiment, cells: Sequence[Cell], out: Path, retry_failed: bool) -> _Plan:
    from qlora_jax.sweep.results import NAME, read
    from qlora_jax.sweep.run import left

    records = read(out, experiment) if (out / NAME).exists() else {}
    reasons = {cell.id: reason for cell in cells if (reason := experiment.skip(cell))}
    todo = [c for c in left(cells, records, retry_failed) if c.id not in reasons]
    return _Plan(records, reasons, todo)


def _make_inputs(
    experiment: Experiment, cells: Sequence[Cell], out: Path, retry_failed: bool
) -> None:
    """Makes what the cells that are to run read and is not there; tells what, and its cost."""
    if missing(experiment, cells):
        for wanted in missing(experiment, _plan(experiment, cells, out, retry_failed).todo):
            say(str(wanted))
            make(wanted)


def _show_plan(
    experiment: Experiment, cells: Sequence[Cell], out: Path, options: argparse.Namespace
) -> None:
    records, reasons, todo = _plan(experiment, cells, out, options.retry_failed)
    absent = missing(experiment, todo)
    estimates = [experiment.estimate(cell) for cell in todo] if experiment.estimate else []
    seconds = sum(e.seconds for e in estimates) / (options.jobs or 1)
    memory = max((e.memory_bytes for e in estimates), default=0) * (options.jobs or 1)
    if options.json:
        plan = [{"id": c.id, **c.values, "state": _state(c, records, reasons)} for c in cells]
        more: dict[str, Any] = {"seconds": seconds, "memory_bytes": memory} if estimates else {}
        if absent:
            more["inputs"] = [
                {"path": str(one.path), "command": one.command, "cost": one.cost} for one in absent
            ]
        print(json.dumps({"cells": plan, "to_run": len(todo), "cost": experiment.cost, **more}))
        return
    for cell in cells:
        print(f"{cell.id}  {cell}  {_state(cell, records, reasons)}")
    print(f"{len(cells)} cells, {len(todo)} to run; {experiment.cost}")
    if estimates:
        print(f"estimate: {seconds / 60:.0f} min, {memory / 2**30:.1f} GiB at a time")
    for one in absent:
        print(one)


def _state(cell: Cell, records: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    if cell.id in reasons:
        return f"skipped: {reasons[cell.id]}"
    record = records.get(cell.id)
    if record is None or record.status == "skipped":
        return "to run"
    return f"failed: {record.error}" if record.error else record.status


def _counted(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(states.items()))
