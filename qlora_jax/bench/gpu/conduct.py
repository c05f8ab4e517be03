"""Runs the parts one after another, each in a process of its own, within a total time."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.bench.gpu import record
from qlora_jax.bench.gpu.lane import REHEARSAL, SLOWER
from qlora_jax.bench.gpu.parts import BenchPart
from qlora_jax.bench.gpu.record import Recorder
from qlora_jax.runtime.errors import UserError

LINES, LOG = "lines.jsonl", "log.txt"
MODULE = "qlora_jax.bench.gpu.child"
PROCESSES = 4
"""Largest number of processes of a part, one after another."""

HUNG = "Timeout ("
"""Beginning of the line that `faulthandler` prints when it ends a process that hangs."""


class BenchRequest(NamedTuple):
    """The parts to run, and their limits.

    Attributes:
      parts: parts in the order of their runs.
      scale: `lane.FULL` or `lane.REHEARSAL`.
      budget: seconds for all parts together.
      folder: folder of `LINES` and `LOG`; new lines are appended to both files.
      peers: Python interpreters that have peers installed.
    """

    parts: Sequence[BenchPart]
    scale: str
    budget: float
    folder: Path
    peers: Sequence[str] = ()


def run(request: BenchRequest, say: Callable[[str], None]) -> None:
    """Runs the parts and records how each ended.

    Raises:
      UserError: the folder cannot be written to.
    """
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
        for name in (LINES, LOG):
            (request.folder / name).touch()
    except OSError as e:
        raise UserError(f"{request.folder}: cannot be written: {e.strerror}") from None
    end = time.monotonic() + request.budget
    for i, part in enumerate(request.parts):
        left = end - time.monotonic()
        place = f"{i + 1} of {len(request.parts)}: {part.name}"
        if left < part.least:
            say(f"{place} left out, {max(left, 0):.0f} s left of {request.budget:.0f}")
            _close(request, part, 0.0, f"left out: {max(left, 0):.0f} s were left")
            continue
        seconds = min(part.limit * SLOWER[request.scale], left)
        say(f"{place} ({part.what}), at most {seconds:.0f} s; {left:.0f} s left in all")
        began = time.monotonic()
        outcome = _attempts(request, part, began + seconds, say)
        _close(request, part, time.monotonic() - began, outcome)
        say(f"{place}: {outcome}")


def environment(part: BenchPart, scale: str) -> dict[str, str]:
    """Returns the environment of a part's process."""
    found = dict(os.environ)
    if scale == REHEARSAL:
        return found | {"JAX_PLATFORMS": "cpu"}
    flags = f"{found.get('XLA_FLAGS', '')} {part.flags}".strip()
    return found | ({"XLA_FLAGS": flags} if flags else {})


def _attempts(
    request: BenchRequest, part: BenchPart, end: float, say: Callable[[str], None]
) -> str:
    """Runs a part and returns its outcome; if its process dies, another runs what is missing.

    The results that the dead process was working on are recorded as absent. A recorded result is
    not tried again.
    """
    path = request.folder / LINES
    before = len(list(record.read([path])))
    told: set[str] = set()
    for _ in range(PROCESSES):
        outcome = _process(request, part, end - time.monotonic(), sorted(told))
        left = end - time.monotonic()
        if outcome == "ok" or left <= 0:
            break
        lines = list(record.read([path]))[before:]
        guilty = record.begun(lines, part.name)
        for name in guilty:
            Recorder(path, part.name).absent(name, outcome, error=True)
        earlier, told = told, record.names(lines, part.name) | set(guilty)
        if told == earlier or left < part.least:
            break
        say(f"{part.name}: {outcome}; goes on in another process")
    return outcome


def _process(request: BenchRequest, part: BenchPart, seconds: float, told: Sequence[str]) -> str:
    """Runs one process of a part and returns its outcome: `ok`, or what went wrong."""
    asked: Mapping[str, Any] = {
        "part": part.name,
        "lines": str(request.folder / LINES),
        "scale": request.scale,
        "seconds": seconds - 3,  # the part stops itself before its process is killed
        "peers": list(request.peers),
        "told": told,
    }
    with (request.folder / LOG).open("a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n===== {part.name}\n")
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, json.dumps(asked)],
            env=environment(part, request.scale),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        log.seek(start)
        said = log.read()
    if code is None:
        return f"ended after its {seconds:.0f} s"
    if code == 0:
        return "ok"
    # Search all lines: the stacks of all threads follow the line that begins with HUNG.
    if any(line.startswith(HUNG) for line in said.splitlines()):
        return "failed: the process hung and was ended"
    last = said.strip().rpartition("\n")[2]
    return f"failed with code {code}: {last or 'it said nothing'}"


def _end(process: subprocess.Popen) -> None:
    """Kills the part's process and all processes that it started; they share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _close(request: BenchRequest, part: BenchPart, seconds: float, outcome: str) -> None:
    """Records the reason for each declared result that is missing, and the part's end."""
    path = request.folder / LINES
    recorder = Recorder(path, part.name)
    known = record.names(record.read([path]), part.name)
    missing = [name for name in part.module.names(request.scale) if name not in known]
    if outcome != "ok":
        for name in missing:
            recorder.absent(name, outcome)
    elif missing:
        outcome = f"failed: declared results that were not recorded: {', '.join(missing)}"
    recorder.end(round(seconds, 1), outcome)
