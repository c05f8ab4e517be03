"""Reads 10,000 damaged files of every format, in processes that are watched.

Right: each input is read, or refused by a `UserError` of one line, within ten seconds and one GiB.
`python -m experiments.faults.fuzz FOLDER SEED NUMBER` makes input NUMBER again; FOLDER is the
folder of examples that `formats.make` makes.
"""

import collections
import contextlib
import io
import multiprocessing
import multiprocessing.connection
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from experiments.faults import formats, mutate
from experiments.faults.common import HANGS_AFTER, HUGE, MIB, Campaign, Row, resident
from qlora_jax.runtime import paths

INPUTS = 10_000
WORKERS = 2
ADDRESS_SPACE = 4 * HUGE
"""Bytes of address space that a worker may add to what it has at its start."""


def damage(seeds: Path, seed: int, number: int, folder: Path) -> tuple[formats.Format, str]:
    """Writes an input: a copy of an example with one damaged file.

    Returns:
      Format of the input, and name of the damaged file.
    """
    rng = random.Random(f"fuzz {seed} {number}")
    chosen = rng.choice(formats.FORMATS)
    shutil.copytree(seeds / chosen.name, folder)
    file = folder / rng.choice(chosen.files)
    mutation = mutate.BY_SUFFIX.get(file.suffix, mutate.any_bytes)
    file.write_bytes(mutation(file.read_bytes() if file.exists() else b"", rng))
    return chosen, file.name


def attempt(seeds: Path, seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Makes and reads an input.

    Returns:
      FORMAT/NAME of the damaged file, and the fault; empty if the file was read or refused rightly.
    """
    from qlora_jax.runtime.errors import UserError

    chosen, name = damage(seeds, seed, number, folder)
    what = f"{chosen.name}/{name}"
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident size
    before = resident(multiprocessing.current_process().pid or 0)
    began = time.monotonic()
    try:
        chosen.read(folder)
        fault = ""
    except UserError as e:
        fault = f"a message of several lines: {e}" if "\n" in str(e) else ""
    except MemoryError:
        fault = "needs too much memory"
    except BaseException as e:
        own = [f for f in traceback.extract_tb(e.__traceback__) if paths.in_package(f.filename)]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "nowhere"
        fault = f"{type(e).__name__} at {place}: {str(e)[:120]!r}"
    grown = resident(multiprocessing.current_process().pid or 0, "VmHWM") - before
    if not fault and grown > HUGE:
        fault = f"took {grown // MIB} MiB"
    if not fault and time.monotonic() - began > HANGS_AFTER:
        fault = f"took {time.monotonic() - began:.0f} s"
    return what, fault


def work(
    connection: multiprocessing.connection.Connection, seeds: Path, seed: int, folder: Path
) -> None:
    """Reads the inputs whose numbers come over a connection, and sends the outcomes back."""
    from qlora_jax.config import ModelConfig
    from qlora_jax.formats.source import open_checkpoint

    open_checkpoint(ModelConfig(path=str(seeds / "base")))  # imports what the inputs need
    most = resident(multiprocessing.current_process().pid or 0, "VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    folder.mkdir()
    (folder / "base").symlink_to(seeds / "base")
    (folder / "model").symlink_to(seeds / "model")
    while True:  # until the process is killed
        number = connection.recv()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = attempt(seeds, seed, number, folder / "input")
        shutil.rmtree(folder / "input", ignore_errors=True)
        connection.send(outcome)


class Worker:
    """A process that reads one input at a time and is replaced when it hangs or dies."""

    def __init__(self, seeds: Path, seed: int, folder: Path) -> None:
        self._arguments = seeds, seed
        self._folder = folder
        self._starts = 0
        self.number: int | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        folder = self._folder.with_name(f"{self._folder.name}-{self._starts}")
        self._starts += 1
        self.process = context.Process(
            target=work, args=(theirs, *self._arguments, folder), daemon=True
        )
        self.process.start()
        theirs.close()
        self.ready = False

    def give(self, number: int) -> None:
        """Sends the number of the next input to the process."""
        self.number, self._since = number, time.monotonic()
        self.connection.send(number)

    def outcome(self) -> tuple[str, str] | None:
        """Returns the outcome of the current input, or None while the process reads it."""
        try:
            if self.connection.poll():
                self.ready = True
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self._start()
            return "", f"ended its process: exit code {code}"
        # the first input of a process also waits for its imports
        if time.monotonic() - self._since > HANGS_AFTER * (2 if self.ready else 12):
            self.process.kill()
            self.process.join()
            self._start()
            return "", f"not read within {2 * HANGS_AFTER:.0f} s"
        return None


def run(campaign: Campaign) -> Iterator[Row]:
    """Reads the inputs and yields a row for each format."""
    seeds = formats.make(campaign)
    total = campaign.times(INPUTS)
    workers = [Worker(seeds, campaign.seed, campaign.folder / f"fuzz-{i}") for i in range(WORKERS)]
    waiting = iter(range(total))
    busy = [worker for worker in workers if _next(worker, waiting)]
    tried: collections.Counter[str] = collections.Counter()
    faults: dict[str, list[str]] = collections.defaultdict(list)
    while busy:
        multiprocessing.connection.wait([worker.connection for worker in busy], timeout=1)
        for worker in list(busy):
            number = worker.number
            if number is None or (outcome := worker.outcome()) is None:
                continue
            what, fault = outcome
            what = what or _what(seeds, campaign, number)
            tried[what.partition("/")[0]] += 1
            if fault:
                faults[what.partition("/")[0]].append(f"{number} {what}: {fault}")
            if sum(tried.values()) % 1000 == 0:
                campaign.say(f"fuzz: {sum(tried.values())} of {total}")
            if not _next(worker, waiting):
                busy.remove(worker)
    for worker in workers:
        worker.process.kill()
        worker.process.join()
    for name in (each.name for each in formats.FORMATS if each.name in tried):
        yield Row(part="fuzz", what=name, tried=tried[name], faults=tuple(faults[name]))


def _next(worker: Worker, waiting: Iterator[int]) -> bool:
    number = next(waiting, None)
    if number is not None:
        worker.give(number)
    return number is not None


def _what(seeds: Path, campaign: Campaign, number: int) -> str:
    folder = campaign.folder / "again"
    chosen, name = damage(seeds, campaign.seed, number, folder)
    shutil.rmtree(folder)
    return f"{chosen.name}/{name}"


if __name__ == "__main__":
    examples, seed, number = sys.argv[1:]
    made, name = damage(Path(examples), int(seed), int(number), Path(f"input-{number}"))
    print(f"input-{number}: {made.name}, {name} is damaged")
