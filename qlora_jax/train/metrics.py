"""Writes the figures of each step to metrics.jsonl and to TensorBoard, and reads metrics.jsonl."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

from qlora_jax.runtime import json_files, paths, processes
from qlora_jax.runtime.atomic import atomic_write, storage_error
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.events import Event, RecordWriter, SessionLog, scalar

NAME = "metrics.jsonl"
# Least time between two flushes of the event file, because each flush waits for the disk.
FLUSH_SECONDS = 10


class Log:
    """A log that writes nothing, for all processes of a run except the first.

    Attributes:
      path: path of the file metrics.jsonl.
      lost: steps before the step to resume from that have no line, because the file was damaged.
    """

    def __init__(self, run_dir: str | Path):
        """Stores the path of the file."""
        self.path = Path(run_dir) / NAME
        self.lost: list[int] = []

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Does nothing; `MetricsLog` adds one line."""

    def close(self) -> None:
        """Does nothing; `MetricsLog` closes the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The error that ended the run matters more than an error in closing the log.
        with contextlib.suppress(*([Exception] if error else [])):
            self.close()


def open_log(run_dir: str | Path, *, start_step: int) -> Log:
    """Opens the log of a run: a `MetricsLog` in the first process, a `Log` in the others."""
    return processes.by_first(lambda: MetricsLog(run_dir, start_step=start_step)) or Log(run_dir)


class MetricsLog(Log):
    """A log in RUN_DIR/metrics.jsonl, with the same scalars in event files in RUN_DIR/tensorboard.

    Each line is one JSON object with `step` and slash-separated names such as `train/loss`. A value
    that is not finite is written as null, because JSON has no NaN. Lines are written without a
    buffer, so that a killed process loses none.
    """

    def __init__(self, run_dir: str | Path, *, start_step: int) -> None:
        """Opens the log of a run that continues after step `start_step`; 0 for a new run.

        Removes lines of later steps, which will run again, and a half-written last line.

        Raises:
          UserError: the folder is not writable, or the file is malformed before its last line.
        """
        # tensorboardX warns about each NaN or infinity; the loss scale handles such gradient norms
        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        super().__init__(run_dir)
        self._start_step = start_step
        there: set[int] = set()
        if self.path.exists():
            there = _keep(self.path, lambda row: row["step"] <= start_step)
        self.lost = [step for step in range(1, start_step + 1) if step not in there]
        try:
            self._file = self.path.open("ab", buffering=0)
            # Not SummaryWriter: it writes from a thread that hangs forever if the disk is full.
            events = self.path.parent / "tensorboard"
            events.mkdir(exist_ok=True)
            self._events = RecordWriter(str(events / f"events.out.tfevents.{time.time_ns()}"))
            # SessionLog.START makes TensorBoard drop steps >= `first` of earlier event files.
            first = start_step + 1 if start_step else 0
            self._add_event(first, file_version="brain.Event:2")
            self._add_event(first, session_log=SessionLog(status=SessionLog.START))
            self._flush_events()
        except OSError as e:
            raise storage_error(self.path.parent, e) or e from e

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Adds one line; at step `start_step`, the line replaces one with the same names.

        Raises:
          UserError: the disk is full.
        """
        numbers = {name: float(value) for name, value in values.items()}
        if step == self._start_step:
            self._file.close()
            _keep(self.path, lambda r: r["step"] != step or r.keys() - {"step"} != numbers.keys())
            self._file = self.path.open("ab", buffering=0)
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            for name, number in numbers.items():
                self._add_event(step, summary=scalar(name, number))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush_events()
        except OSError as e:
            raise storage_error(self.path.parent, e) or e from e

    def close(self) -> None:
        """Closes both files.

        Raises:
          UserError: the disk is full.
        """
        self._file.close()
        try:
            self._events.close()
        except OSError as e:
            raise storage_error(self.path.parent, e) or e from e

    def _flush_events(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def _add_event(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._events.write(event.SerializeToString())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl in order, with NaN for null, without a cut last line.

    Raises:
      UserError: the file does not exist, or has a malformed line before the last.
    """
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for _, row in _rows(Path(path))
    ]


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; a run writes it in its run directory") from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json_files.parse(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line, row
        elif number < len(lines):
            raise UserError(f"{path}:{number}: not a JSON object with a step; remove this line")


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> set[int]:
    """Removes the unwanted lines from the file; returns the steps of the other lines."""
    kept = [(line, row["step"]) for line, row in _rows(path) if wanted(row)]
    content = b"".join(line + b"\n" for line, _ in kept)
    if content != path.read_bytes():
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    return {step for _, step in kept}
