"""Progress for people: a bar on a terminal, text that changes in place in a notebook, else lines.

It goes to stderr, or into the cell's output; stdout is left to results.
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
"""Between two updates: each is a message to the browser."""
WIDTH = 20
"""Of a bar."""


class TrainDisplay:
    """Step, loss, tokens/s and the time left of a training run; a context manager."""

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
        """Shows the figures of a finished step."""
        now = self._clock()
        # The first step's time is mostly compilation, so the rate is counted from its end.
        if self._first is None:
            self._first = (step, now)
        done = step - self._first[0]
        left = (now - self._first[1]) / done * (self._total - step) if done else math.nan
        eta = "" if step >= self._total else f"  ETA {duration(left)}"
        self._line.update(step, f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s{eta}")

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        self._line.note(text)


@contextlib.contextmanager
def progress(
    description: str,
    total: int | None = None,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[..., None]]:
    """Shows other long work, such as loading a model.

    Yields `advance(n=1)`, to be called as items are done. `total` is None when it is unknown.
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
    """Shows long work on `total` items of about one size, with the time left.

    Yields `advance()`, to be called as items are done, by any thread.
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
    """Minutes and seconds, `4:05`, or hours, `1:02:03`; `-:--` when it is not known."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """What was done of a total, as a bar or as text; `start` and `stop` go around it."""

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
                # Results on a redirected stdout must not end up in the bar's terminal.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._bar.add_task(description, total=total, completed=start, figures="")

    def start(self, figures: str) -> None:
        self._began = self._printed = self._clock()
        self._now = self._shown = (self._now[0], figures)
        if self._bar:
            self._bar.start()
            self._bar.update(self._task, figures=figures)
        else:
            self._print()

    def update(self, done: int, figures: str) -> None:
        self._now = (done, figures)
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures)
        elif self._clock() - self._printed >= self._seconds:
            self._print()

    def note(self, text: str) -> None:
        if self._notebook:
            print(printable(text))  # what stderr gets looks like an error there
        else:
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
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
