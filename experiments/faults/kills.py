"""Kills runs and sweeps at random moments, resumes them, and compares them with undisturbed ones.

Right: the adapter has the same bytes, the last checkpoint holds the same state, and every step or
cell is recorded once with the same figures, except those of the clock.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import Popen
from typing import Any

from experiments.faults.common import ROOT, Campaign, Row, command
from experiments.tools.kill_resume import (
    POLL_SECONDS,
    Hit,
    Moment,
    Trial,
    adapter_hash,
    choose,
    last_step,
    saved_steps,
)

STEPS = 60
CLOCK = ("train/seconds", "train/tokens_per_s", "train/update_ms")
"""The only figures that may differ."""

RUNS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "a row for each example": (16, {"data__packing": False}),
    "packing, accumulation, dropout, cosine": (
        14,
        {
            "train__gradient_accumulation": 2,
            "lora__dropout": 0.1,
            "optimizer__schedule": "cosine",
        },
    ),
    # only arrays of 4096 elements or more get 8-bit moments
    "moments of 8 bits": (12, {"lora__rank": 64, "optimizer__moments": "int8"}),
    "moments on the host": (12, {"optimizer__offload": "host"}),
    "DoRA": (12, {"lora__variant": "dora"}),
    "PiSSA and LoRA+": (12, {"lora__init": "pissa", "optimizer__lora_plus_ratio": 4}),
}
"""Kind of run to its number of kills in the whole campaign, and its settings."""

SWEEPS: Mapping[str, tuple[int, str, int]] = {
    "a sweep": (11, "None", 2),
    "a sweep of populations": (11, "Population(together, key=lambda cell: 0, largest=3)", 1),
}
"""Kind of sweep to its number of kills in the whole campaign, its population, and its --jobs."""

MODULE = """
from qlora_jax import config as configs
from qlora_jax.sweep import Analysis, Experiment, Population, Verdict, markdown, statistics
from qlora_jax.train.population import train_population

def settings(cell):
    return {{"lora.rank": str(cell["rank"]), "train.seed": str(cell["seed"])}}

def together(cells, context):
    found = train_population(configs.load_config({config!r}), [settings(cell) for cell in cells])
    return [{{"loss": result.losses[-1], "held_out": result.held_out[6]}} for result in found]

def run(cell, context):
    return together([cell], context)[0]

def analyse(table):
    interval = statistics.mean(table.column("loss"))
    rows = [{{"rank": r, "cells": len(t)}} for (r,), t in table.groups("rank").items()]
    verdict = Verdict("the loss", interval, statistics.within(interval, 0))
    return Analysis(verdict, {{"By rank": markdown(rows)}})

EXPERIMENT = Experiment(
    name="killed", question="?", paper="-", expected="-", cost="a minute",
    axes={{"rank": [2, 4]}}, seeds=(0, 1, 2), run=run, analyse=analyse, population={population},
)
"""
CELLS = 6


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for each kind of run and of sweep."""
    # a separate process imports jax, because this one forks
    with multiprocessing.get_context("spawn").Pool(1) as reader:
        for name in RUNS:
            yield train(campaign, name, lambda output: reader.apply(state, (output,)))
    for name in SWEEPS:
        yield sweep(campaign, name)


def train(campaign: Campaign, name: str, read_state: Callable[[Path], Any]) -> Row:
    """Kills and resumes one kind of run; returns its row."""
    kills, settings = RUNS[name]
    folder = campaign.folder / "kills" / name
    shape = {"train__steps": STEPS, "train__save_every": 2}
    config = campaign.config(folder / "config.yaml", **(shape | dict(settings)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trial = Trial(config, environment=environment)
    whole, killed = folder / "whole", folder / "killed"
    rng = campaign.rng("kills", name)
    # The first killed run compiles, so the undisturbed run measures how long later ones need to
    # log a step.
    hits = [trial.hit(killed, Moment(step=1))]
    saving = 0
    try:
        seconds = trial.finish(whole)
        for left in range(campaign.times(kills), 0, -1):
            hits.append(trial.hit(killed, choose(rng, last_step(killed), STEPS, left, seconds)))
            saving += in_saving(hits[-1], killed)
        trial.finish(killed)
    except RuntimeError as e:
        return Row(part="kills", what=name, tried=len(hits), faults=(f"{name}: {e}",))
    faults = [f"{hit.moment}: exit code {hit.code}" for hit in hits if not hit.sent and hit.code]
    faults += differences(whole, killed, read_state)
    landed = [hit for hit in hits if hit.sent]
    early = sum(hit.step == 0 or hit.moment.after > 0 for hit in landed)
    return Row(
        part="kills",
        what=name,
        tried=len(landed),
        faults=tuple(f"{name}: {fault}" for fault in faults),
        note=f"{early} while starting, {saving} while saving; {len(hits) - len(landed)} too late",
    )


def in_saving(hit: Hit, output: Path) -> bool:
    """Returns whether a kill came while a checkpoint was written, by the files that remain."""
    left = any((output / "checkpoints").glob("*orbax-checkpoint-tmp*"))
    return hit.sent and hit.moment.saving and left


def differences(whole: Path, killed: Path, read_state: Callable[[Path], Any]) -> list[str]:
    """Returns how a killed and then finished run differs from the undisturbed one."""
    kinds: Mapping[str, Callable[[Path], Any]] = {
        "the adapter's bytes": adapter_hash,
        "the last checkpoint's state": read_state,
        "the figures": figures,
    }
    found = [f"{what} differ" for what, read in kinds.items() if read(whole) != read(killed)]
    steps = [row["step"] for row in figures(killed) if "train/loss" in row]
    if steps != list(range(1, STEPS + 1)):
        found.append(f"the steps in metrics.jsonl are {steps}")
    return found


def state(output: Path) -> dict[str, str]:
    """Returns the digest of each array in the last checkpoint, by name."""
    import orbax.checkpoint as ocp

    from qlora_jax.runtime import digests

    manager = ocp.CheckpointManager(output / "checkpoints")
    args = ocp.args.Composite(state=ocp.args.StandardRestore())
    restored = manager.restore(saved_steps(output)[-1], args=args).state
    manager.close()
    return {name: digests.digest(value) for name, value in restored.items()}


def figures(output: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl by step, without the clock's figures."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_bytes().splitlines()]
    rows.sort(key=lambda row: (row["step"], "eval/loss" in row))
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def sweep(campaign: Campaign, name: str) -> Row:
    """Kills and resumes one kind of sweep; returns its row."""
    kills, population, jobs = SWEEPS[name]
    folder = campaign.folder / "kills" / name
    experiment = write_experiment(campaign, folder, population)
    whole, rng = folder / "whole", campaign.rng("kills", name)

    def start(out: Path, hit: Callable[[Popen[str]], None] | None = None) -> Any:
        # two minutes are not enough for a sweep on a busy machine
        return command("sweep", experiment, "--out", out, "--jobs", str(jobs), timeout=600, hit=hit)

    ended = start(whole)
    seconds = ended.seconds / 2  # this sweep compiled; later ones do not
    faults = [fault] if (fault := ended.fault(0)) else []
    landed = with_rows = 0
    killed = [folder / "killed-0"]
    for _ in range(campaign.times(kills)):
        out = killed[-1]
        rows = rng.randint(len(records(out)) + 1, CELLS)
        wait = rng.uniform(0, seconds) if rng.random() < 0.3 else None
        ended = start(out, kill_when(out, rows, wait))
        landed += ended.code == -signal.SIGKILL
        with_rows += ended.code == -signal.SIGKILL and bool(records(out))
        if ended.code != -signal.SIGKILL and (fault := ended.fault(0)):
            faults.append(fault)
        if len(records(out)) >= CELLS:
            killed.append(folder / f"killed-{len(killed)}")
    faults += [fault for out in killed if (fault := start(out).fault(0))]
    for out in killed:
        faults += sweep_differences(whole, out)
    return Row(
        part="kills",
        what=name,
        tried=landed,
        faults=tuple(f"{name}: {fault}" for fault in faults),
        note=f"{with_rows} with rows there",
    )


def write_experiment(campaign: Campaign, folder: Path, population: str) -> Path:
    """Writes an experiment of six cells that train, and its config; returns the experiment."""
    shape = {"train__steps": 6, "train__batch_size": 2}
    config = campaign.config(folder / "config.yaml", **shape)
    path = folder / "killed.py"
    path.write_text(MODULE.format(config=str(config), population=population), encoding="utf-8")
    return path


def kill_when(out: Path, rows: int, seconds: float | None) -> Callable[[Popen[str]], None]:
    """Returns a `hit` that kills a sweep after `seconds`; if None, once `rows` are recorded."""

    def hit(process: Popen[str]) -> None:
        began = time.monotonic()
        while process.poll() is None:
            old = seconds is not None and time.monotonic() - began >= seconds
            if old or (seconds is None and len(records(out)) >= rows):
                process.kill()
                return
            time.sleep(POLL_SECONDS)

    return hit


def records(out: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of results.jsonl, without their times."""
    path = out / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [{key: value for key, value in row.items() if key != "wall_s"} for row in rows]


def sweep_differences(whole: Path, killed: Path) -> list[str]:
    """Returns how a killed and then finished sweep differs from the undisturbed one.

    If a cell has several lines, the last counts, because a group of cells of which only some are
    recorded runs again as a whole.
    """
    there, here = ({row["id"]: row for row in records(out)} for out in (whole, killed))
    found = [
        f"cell {cell}: {there[cell]['rows']} in the whole sweep, {here[cell]['rows']} here"
        for cell in there.keys() & here.keys()
        if there[cell] != here[cell]
    ]
    if here.keys() != there.keys() or len(here) != CELLS:
        found.append(f"{len(here)} of {CELLS} cells")
    return found
