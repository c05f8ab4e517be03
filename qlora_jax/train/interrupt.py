"""SIGINT and SIGTERM as a request to stop at the next safe point."""

import signal
import threading
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop and saved its state.

    Attributes:
      number: of the signal.
      code: the exit code, 128 + signal.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number
        self.code = 128 + number


class Requests:
    """While entered, the first SIGINT or SIGTERM is noted in `signal`; the next acts at once.

    A thread other than the main one gets no signals, and leaves their handlers alone.
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
