"""Shows progress: a bar on a terminal, text that is replaced in a notebook, else lines.

The progress goes to stderr, or to the output of the notebook's cell. stdout is for results.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from qlora_jax.runtime.notebook import CellOutput
from qlora_jax.runtime.streams import printable

PLAIN_SECONDS = 10.0
NOTEBOOK_SECONDS = 0.5
"""Seconds between two updates in a notebook, because each one is a message to the browser."""
WIDTH = 20
"""Width of a bar, in characters."""


class TrainDisplay:
    """A context manager that shows step, loss, tokens/s and remaining time of a training run."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        description: str = "training",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Shows steps `start` + 1 to `total`; `start` is above 0 in a resumed run."""
        self._total = total
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._line = ProgressLine(description, total, start, console, clock)

    def __enter__(self) -> "TrainDisplay":
        self._line.start("compiling the first step")
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()

    def update(self, step: int, *, loss: float, tokens_per_s: float) -> None:
        """Shows the values of a finished step."""
        now = self._clock()
        # The first step is mostly compilation, so the rate counts from the end of this step.
        if self._first is None:
            self._first = (step, now)
        done = step - self._first[0]
        left = (now - self._first[1]) / done * (self._total - step) if done else math.nan
        eta = "" if step >= self._total else f"  ETA {duration(left)}"
        self._line.update(step, f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s{eta}")

    def note(self, text: str) -> None:
        """Prints a permanent line above the bar."""
        self._line.note(text)


@contextlib.contextmanager
def progress(
    description: str,
    total: int | None = None,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[..., None]]:
    """Shows the progress of long work, such as loading a model.

    Yields the function `advance(n=1)`; call it after each finished item. `total` is None if it is
    unknown.
    """
    line = ProgressLine(description, total, 0, console, clock)
    done = 0

    def advance(n: int = 1) -> None:
        nonlocal done
        done += n
        line.update(done, "")

    line.start("")
    try:
        yield advance
    finally:
        line.stop()


@contextlib.contextmanager
def counted(
    description: str,
    total: int,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[], None]]:
    """Shows progress and remaining time of work on `total` items of similar size.

    Yields the function `advance()`; call it after each finished item, from any thread.
    """
    line, began, done = ProgressLine(description, total, 0, console, clock), clock(), 0
    lock = threading.Lock()

    def advance() -> None:
        nonlocal done
        with lock:
            done += 1
            left = (clock() - began) / done * (total - done)
            line.update(done, f"ETA {duration(left)}" if done < total else "")

    line.start("")
    try:
        yield advance
    finally:
        line.stop()


def duration(seconds: float) -> str:
    """Returns a time as minutes `4:05` or hours `1:02:03`; `-:--` if it is not finite."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """The number of finished items, as a bar or as text; call `start` first and `stop` last."""

    def __init__(
        self,
        description: str,
        total: int | None,
        start: int,
        console: Console | None,
        clock: Callable[[], float],
    ) -> None:
        self._console = console or Console(stderr=True)
        self._description = description
        self._total = total
        self._clock = clock
        self._began = self._printed = 0.0
        self._now = self._shown = (start, "")
        self._bar: Progress | None = None
        self._notebook = self._console.is_jupyter
        self._seconds = NOTEBOOK_SECONDS if self._notebook else PLAIN_SECONDS
        self._write = CellOutput() if self._notebook else self.note
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=WIDTH),
                MofNCompleteColumn(),
                Elapsed(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self._console,
                # Results must go to a redirected stdout, not to the terminal of the bar.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._bar.add_task(description, total=total, completed=start, figures="")

    def start(self, figures: str) -> None:
        """Shows the bar or the first line, with the text `figures`."""
        self._began = self._printed = self._clock()
        self._now = self._shown = (self._now[0], figures)
        if self._bar:
            self._bar.start()
            self._bar.update(self._task, figures=figures)
        else:
            self._print()

    def update(self, done: int, figures: str) -> None:
        """Sets the finished items and the text; prints a line only after the minimum interval."""
        self._now = (done, figures)
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures)
        elif self._clock() - self._printed >= self._seconds:
            self._print()

    def note(self, text: str) -> None:
        """Prints a permanent line."""
        if self._notebook:
            print(printable(text))  # a notebook shows stderr like an error
        else:
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Ends the bar, or prints the last state if it was not printed yet."""
        if self._bar:
            self._bar.stop()
        elif self._now != self._shown:
            self._print()

    def _print(self) -> None:
        done, figures = self._shown = self._now
        self._printed = self._clock()
        of = "" if self._total is None else f"/{self._total}"
        elapsed = duration(self._printed - self._began)
        bar = f"{_bar(done, self._total)}  " if self._notebook and self._total else ""
        text = f"{self._description}  {bar}{done}{of}  {elapsed}  {figures}"
        self._write(printable(text.rstrip()))


def _bar(done: int, total: int) -> str:
    full = WIDTH * min(done, total) // total
    return "━" * full + "┈" * (WIDTH - full)
