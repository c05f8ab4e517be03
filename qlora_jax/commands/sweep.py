"""The command `qlora-jax sweep`."""

import argparse
import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.commands.common import count, say
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.sweep.experiment import Cell, Experiment
from qlora_jax.sweep.find import find, load_experiment, where, with_axes
from qlora_jax.sweep.inputs import make, missing

if TYPE_CHECKING:
    from qlora_jax.sweep.cost import RemainingWork

TEXT = "Run an experiment's grid of cells, and compare the result with the paper's claim."
FOLDER = Path("runs") / "sweeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `sweep` to its parser."""
    parser.epilog = (
        "The same command continues a stopped sweep. The experiments that have names are "
        "in the folder\nexperiments/ of the repository, and docs/experiments.md there explains "
        "them."
    )
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="name of an experiment, or a .py file"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,VALUE]",
        help="only run cells with one of these values; may be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,VALUE]",
        help="replace the values of an axis, as in config=configs/rank.yaml; may be repeated",
    )
    parser.add_argument(
        "--seeds", type=_seeds, metavar="0,1,2", help="replace the experiment's seeds"
    )
    parser.add_argument("--jobs", type=count, metavar="N", help="tasks at a time; default 1")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the results; default {FOLDER}/NAME"
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray", "slurm"],
        default="local",
        help="engine that runs the cells",
    )
    parser.add_argument(
        "--resource",
        action="append",
        default=[],
        type=_resource,
        metavar="NAME=VALUE",
        help="resource per task, for ray (num_gpus=1) or slurm (slurm_partition=gpu); repeatable",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="only list the cells and their cost")
    only.add_argument(
        "--analyse-only", action="store_true", help="only analyse the existing results"
    )


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers such as 0,1,2, not {text!r}"
        ) from None


def _resource(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, not {text!r}")
    try:
        return name, json_files.parse(value)
    except ValueError:
        return name, value


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Runs the unfinished cells, analyses the results, and prints the verdict.

    Raises:
      UserError: the experiment, a condition or the folder cannot be used.
      RunFailed: a cell, the analysis, or a command that makes an input failed.
    """
    path = find(options.experiment)
    experiment = with_axes(load_experiment(path), options.set)
    cells = where(experiment.cells(options.seeds), options.where)
    out = options.out or FOLDER / experiment.name
    if options.resource and options.engine == "local":
        raise UserError(
            "--resource: engine local has no resources; leave it out, or give another --engine"
        )
    if options.dry_run:
        _show_plan(experiment, cells, out, options)
        return
    if not options.analyse_only:
        _before(experiment, cells, out, options)
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


def _before(
    experiment: Experiment, cells: Sequence[Cell], out: Path, options: argparse.Namespace
) -> None:
    """Prints the estimated time of the sweep, and makes the missing inputs of its cells."""
    from qlora_jax.runtime.time_estimates import SHORT
    from qlora_jax.sweep.cost import sentence, time_of

    found, jobs = _work(experiment, cells, out, options), options.jobs or 1
    expected = time_of(experiment, found, out, jobs)
    if expected.seconds > SHORT:
        say(f"{len(found.running):,} cells to run; {sentence(expected, jobs)}")
    _make_inputs(experiment, found.running)


def _make_inputs(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Makes the missing inputs of the cells; prints each input and its cost first."""
    for wanted in missing(experiment, cells):
        say(str(wanted))
        make(wanted)


def _show_plan(
    experiment: Experiment, cells: Sequence[Cell], out: Path, options: argparse.Namespace
) -> None:
    from qlora_jax.sweep.cost import sentence, time_of, total_cost_text

    found, jobs = _work(experiment, cells, out, options), options.jobs or 1
    expected = time_of(experiment, found, out, jobs)
    absent = missing(experiment, found.running)
    states = {cell.id: _state(cell, found) for cell in cells}
    counts = collections.Counter(state for state, _ in states.values())
    again = sum(word == AGAIN for _, word in states.values())
    if options.json:
        rows = [
            {"id": c.id, **c.values, "state": ": ".join(filter(None, states[c.id]))} for c in cells
        ]
        told: dict[str, Any] = {
            "cells": rows,
            "chosen": len(cells),
            **{state: counts[state] for state in ("done", "failed", "skipped")},
            "to_run": len(found.running),
            "again": again,
            "seconds": expected.seconds if expected.source or not found.running else None,
            "seconds_from": expected.source,
            "cells_of_unknown_time": expected.unknown,
            "memory_bytes": expected.memory_bytes,
            "cost": experiment.cost,
        }
        if absent:
            told["inputs"] = [
                {"path": str(one.path), "command": one.command, "cost": one.cost} for one in absent
            ]
        print(json.dumps(told))
        return
    for cell in cells:
        print(f"{cell.id}  {cell}  {': '.join(filter(None, states[cell.id]))}")
    finished = "".join(
        f"{counts[state]:,} {state}, " for state in ("done", "failed", "skipped") if counts[state]
    )
    more = f", {again:,} of them done and run again with their group" if again else ""
    print(f"{len(cells):,} cells chosen: {finished}{len(found.running):,} to run{more}")
    if found.running:
        besides = "; not counting the inputs below, which are made first" if absent else ""
        print(f"{sentence(expected, jobs)}{besides}")
    print(f"the whole experiment: {total_cost_text(experiment)}")
    for one in absent:
        print(one)


def _work(
    experiment: Experiment, cells: Sequence[Cell], out: Path, options: argparse.Namespace
) -> "RemainingWork":
    from qlora_jax.sweep.cost import work

    return work(experiment, cells, out, options.retry_failed)


AGAIN = "run again with its group"


def _state(cell: Cell, found: "RemainingWork") -> tuple[str, str]:
    """Returns the state of a cell and a remark about it, which may be empty."""
    if cell.id in found.reasons:
        return "skipped", found.reasons[cell.id]
    record = found.records.get(cell.id)
    if any(cell.id == one.id for one in found.left):
        return "to run", ""
    assert record is not None
    if any(cell.id == one.id for one in found.running):
        return record.status, AGAIN
    return record.status, record.error


def _counted(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(states.items()))
