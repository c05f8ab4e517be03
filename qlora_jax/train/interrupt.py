"""Turns SIGINT and SIGTERM into a request to stop at the next safe point."""

import signal
import threading
from types import FrameType


class Stopped(Exception):
    """The error of a run that a signal stopped, after the run saved its state.

    Attributes:
      number: number of the signal.
      code: exit code of the process, 128 + signal number.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number
        self.code = 128 + number


class Requests:
    """A context that stores the first SIGINT or SIGTERM in `signal`; the next one acts at once.

    Python delivers signals to the main thread only, so in another thread the context does not
    change the signal handlers.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Requests":
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._previous = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for n, handler in self._previous.items():
            signal.signal(n, handler)
