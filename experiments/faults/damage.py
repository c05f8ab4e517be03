"""Damages files of runs, adapters and merged models, one at a time, and then uses them.

Right: `train --resume` gives the adapter of the undamaged run; or it ends with exit code 2 and a
line that names the file or one of its folders, and changes no file. A command that reads an adapter
or a model names a tensor that differs from the written one.
"""

import collections
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.faults.common import ROOT, Campaign, Ended, Row, command
from experiments.faults.kills import figures
from experiments.tools.kill_resume import Moment, Trial, adapter_hash

STEPS = 12
WORKERS = 2
SECONDS = 300.0
"""Seconds after which a resumed run counts as hanging."""


def flip(path: Path, rng: random.Random) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Cuts a file to a random prefix."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def remove(path: Path, rng: random.Random) -> None:
    """Removes a file or a folder."""
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)


def to_folder(path: Path, rng: random.Random) -> None:
    """Replaces a file by an empty folder."""
    path.unlink()
    path.mkdir()


def to_file(path: Path, rng: random.Random) -> None:
    """Replaces a folder by a file."""
    shutil.rmtree(path)
    path.write_bytes(b"a file\n")


Change = Callable[[Path, random.Random], object]
OF_FILES: Mapping[str, tuple[int, Change]] = {
    "one bit": (3, flip),
    "a prefix": (3, cut),
    "nothing in it": (1, lambda path, rng: os.truncate(path, 0)),
    "zeros": (1, lambda path, rng: path.write_bytes(bytes(path.stat().st_size))),
    "random bytes": (1, lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size))),
    "removed": (1, remove),
    "a folder in its place": (1, to_folder),
}
"""Kind of damage to the number of times that each file gets it, and the function for it."""

OF_FOLDERS: Mapping[str, tuple[int, Change]] = {
    "a folder removed": (1, remove),
    "a file in a folder's place": (1, to_file),
}
"""Kind of damage to a folder, in the form of `OF_FILES`."""

ALL = {**OF_FILES, **OF_FOLDERS}


class Case(NamedTuple):
    """Damage `how` to the file `name` of a copy of run `start`; `whole` is a complete run."""

    start: Path
    whole: Path
    name: str
    how: str
    seed: int

    def __str__(self) -> str:
        return f"{self.start.name}/{self.name}: {self.how} (seed {self.seed})"


class Outcome(NamedTuple):
    """Result of one case.

    Attributes:
      what: kind of the end, a key of `ENDS`.
      fault: description of the fault; empty if there is none.
      figures: whether metrics.jsonl differs from the complete run's and no message says so.
    """

    what: str
    fault: str = ""
    figures: bool = False


ENDS: Mapping[str, str] = {
    "named": "refused by name",
    "older": "from the older checkpoint",
    "same": "unaffected",
    "none": "without an end",
}


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for each kind of damage."""
    starts = make_starts(campaign)
    context = multiprocessing.get_context("spawn")
    with context.Pool(WORKERS, initializer=begin_worker) as pool:
        for how in ALL:
            cases = make_cases(campaign, starts, how)
            waiting = [(case, pool.apply_async(resume, (case,))) for case in cases]
            yield row(how, [(case, outcome(result)) for case, result in waiting])
        for what, (folder, arguments) in make_weights(campaign, starts).items():
            rng = campaign.rng("damage", what)
            seeds = [rng.randrange(2**32) for _ in range(campaign.times(60))]
            reading = [
                (seed, pool.apply_async(read_flipped, (folder, arguments, seed))) for seed in seeds
            ]
            yield row(f"{what}: one bit of a tensor", [(s, outcome(r)) for s, r in reading])


def make_starts(campaign: Campaign) -> Sequence[Path]:
    """Makes a complete run, and one that was killed between two checkpoints."""
    folder = campaign.folder / "damage"
    config = campaign.config(folder / "config.yaml", train__steps=STEPS, train__eval_every=4)
    trial = Trial(config, environment=os.environ | {"PYTHONPATH": str(ROOT)})
    whole, midway = folder / "whole", folder / "midway"
    trial.finish(whole)
    trial.hit(midway, Moment(step=8))
    return whole, midway


def make_cases(campaign: Campaign, starts: Sequence[Path], how: str) -> list[Case]:
    """Returns cases for files or folders of the runs and their newest checkpoints, shuffled."""
    rng = campaign.rng("damage", how)
    times = ALL[how][0]
    cases = []
    for start in starts:
        newest = max((start / "checkpoints").iterdir(), key=lambda path: int(path.name))
        for path in sorted(start.rglob("*")):
            older = path.is_relative_to(start / "checkpoints") and not (
                path.is_relative_to(newest) or path == newest.parent
            )
            fits = path.is_dir() if how in OF_FOLDERS else path.is_file() and path.stat().st_size
            if fits and not older:
                name = str(path.relative_to(start))
                cases += [Case(start, starts[0], name, how, seed) for seed in range(times)]
    return rng.sample(cases, campaign.times(len(cases)))


def begin_worker() -> None:
    """Redirects a worker's output to its own file, and makes it compile as the program does."""
    log, path = tempfile.mkstemp()
    os.unlink(path)
    for number in (1, 2):
        os.dup2(log, number)
    from qlora_jax.runtime import compilation

    compilation.use_wide_vectors()


def run_here(*arguments: str) -> Ended:
    """Runs a command in this worker; all its output counts as stderr."""
    from qlora_jax import cli

    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    began = time.monotonic()
    code: int | None = 1
    try:
        code = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    gc.collect()  # leftover objects print their warnings now, not in the next case
    text = os.pread(2, 2**24, 0).decode(errors="replace")
    return Ended(
        code=code, out="", err=text, seconds=time.monotonic() - began, computed=0.0, peak=0
    )


def resume(case: Case) -> Outcome:
    """Damages a copy of a run and resumes it; called in a worker."""
    with tempfile.TemporaryDirectory(dir=case.start.parent) as folder:
        copy = Path(shutil.copytree(case.start, Path(folder) / "run"))
        damaged = copy / case.name
        ALL[case.how][1](damaged, random.Random(f"{case.name} {case.seed}"))
        before = contents(copy)
        config = str(case.start.parent / "config.yaml")
        ended = run_here("train", config, f"--output={copy}", "--resume")
        problems = [ended.fault(0, 2)]
        if ended.code == 0:
            what = "older" if "is used instead" in ended.err else "same"
            if adapter_hash(copy) != adapter_hash(case.whole):
                problems.append("exit code 0 with another adapter")
        else:
            what = "named"
            names = [str(path) for path in (damaged, *damaged.parents) if path.is_relative_to(copy)]
            if not any(name in ended.err.rstrip("\n").splitlines()[-1] for name in names):
                problems.append("not named")
            if changed := [name for name, _ in before.items() ^ contents(copy).items()]:
                problems.append(f"refused, and changed {', '.join(sorted(set(changed)))}")
        told = "metrics.jsonl: damaged" in ended.err
        others = ended.code == 0 and not told and figures(copy) != figures(case.whole)
        fault = "; ".join(problem for problem in problems if problem)
        return Outcome(what, fault.replace(folder, "…"), others)


def contents(folder: Path) -> dict[str, str]:
    """Returns the digest of every file except the lock, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def make_weights(
    campaign: Campaign, starts: Sequence[Path]
) -> Mapping[str, tuple[Path, Sequence[str]]]:
    """Exports and merges the complete run; returns each folder and the command that reads it.

    `{}` in the command stands for the folder.
    """
    folder = campaign.folder / "damage"
    adapter, merged = folder / "exported", folder / "merged"
    for words in (("export", starts[0], adapter), ("merge", starts[0], merged)):
        ended = command(*words)
        if ended.code != 0:
            raise RuntimeError(ended.err.splitlines()[-1])
    prompt = ("--prompt", "a", "--max-new-tokens", "1")
    return {
        "an exported adapter": (
            adapter,
            ("generate", str(campaign.model), "--adapter", "a={}", *prompt),
        ),
        "a merged model": (merged, ("quantize", "{}", "{}-out")),
    }


def read_flipped(folder: Path, arguments: Sequence[str], seed: int) -> Outcome:
    """Flips a bit of a tensor in a copy of a folder, and reads the copy; called in a worker."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "copy"))
        file = next(copy.glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        name = rng.choice([name for name in header if name != "__metadata__"])
        first, end = header[name]["data_offsets"]
        bit = rng.randrange(8 * first, 8 * end)
        data[begin + bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        ended = run_here(*(argument.format(copy) for argument in arguments))
        fault = ended.fault(2) or ""
        last = ended.err.rstrip("\n").splitlines()[-1]
        if not fault and not (name in last and str(copy) in last):
            fault = f"{name} not named: {last[:200]}"
        return Outcome("named", fault)


def outcome(result: "multiprocessing.pool.AsyncResult[Outcome]") -> Outcome:
    """Returns the result of a worker, or a fault if the worker hangs or fails."""
    try:
        return result.get(SECONDS)
    except multiprocessing.TimeoutError:
        return Outcome("none", f"no end after {SECONDS:.0f} s")
    except Exception as e:
        return Outcome("none", f"the check itself failed: {type(e).__name__}: {e}")


def row(what: str, found: Sequence[tuple[object, Outcome]]) -> Row:
    """Returns the row of one kind of damage: counts of its outcomes, and its faults."""
    counts = collections.Counter(one.what for _, one in found)
    notes = [f"{counts[key]} {text}" for key, text in ENDS.items() if counts[key]]
    others = sum(one.figures for _, one in found)
    return Row(
        part="damage",
        what=what,
        tried=len(found),
        faults=tuple(f"{case}: {one.fault}" for case, one in found if one.fault),
        note=", ".join(notes) + (f"; {others} with other figures in metrics.jsonl" * bool(others)),
    )
