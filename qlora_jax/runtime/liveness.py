"""Heartbeats between the processes of a run: if one process ends, all end with a clear message."""

import contextlib
import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

from qlora_jax.runtime.streams import printable

BEAT_S = 1
"""Seconds between two heartbeats of a process."""

SILENT_S = 20
"""Seconds without a heartbeat after which a process counts as dead."""

GRACE_S = 2
"""Seconds that a process gets to end by itself after another one: both may have one cause."""

FOLDER = "qlora_jax/signs"
"""Prefix of the heartbeat keys in the coordination service; the process index follows."""

GONE = "process 0, or the network to it, is gone"
"""Message if the coordination service cannot be reached."""

RESUME = "--resume continues from the last checkpoint"

ENDED = "ended: "
"""Prefix of the last heartbeat of a process that fails; the reason follows."""

FINISHED = "finished"
"""Last heartbeat of a process that has finished its part of the run."""


class Heartbeats:
    """The newest heartbeats of the other processes.

    Args:
      index: index of this process, from 0.
      count: number of all processes.
      now: current time of a monotonic clock, in seconds.
    """

    def __init__(self, index: int, count: int, now: float):
        self._others = [i for i in range(count) if i != index]
        self._answered = now
        self._newest: dict[int, tuple[str, float]] = {}

    def update(self, found: Mapping[int, str], now: float) -> None:
        """Records the newest heartbeat of each process, and the time at which it changed."""
        self._answered = now
        for process, sign in found.items():
            if self._newest.get(process, ("", now))[0] != sign:
                self._newest[process] = sign, now

    def fault(self, now: float) -> str | None:
        """Returns the description of a failed process; None if no failure is known."""
        if now - self._answered > SILENT_S:
            return f"process 0 has not answered for {SILENT_S} s"
        for process in self._others:
            sign, since = self._newest.get(process, ("", now))
            if sign.startswith(ENDED) and now - since > GRACE_S:
                return f"process {process} ended: {sign.removeprefix(ENDED)}"
            if not sign.startswith((ENDED, FINISHED)) and now - since > SILENT_S:
                return f"process {process} has given no sign of life for {SILENT_S} s"
        return None

    def finished(self) -> bool:
        """Returns whether all other processes have finished their part of the run."""
        return all(self._newest.get(i, ("", 0))[0] == FINISHED for i in self._others)


class HeartbeatThread:
    """A thread that sends heartbeats, and ends this process if another process sends none.

    Args:
      client: client of the coordination service of `jax.distributed`.
      index: index of this process, from 0.
      count: number of all processes.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self._index, self._count = client, index, count
        self._signs = Heartbeats(index, count, time.monotonic())
        self._last: str | None = None
        self._giving, self._over = threading.Lock(), threading.Event()
        # jax aborts this process if process 0 or its host is gone. A handler of Python's `signal`
        # would never run: Python calls it in the main thread after abort() returns, which abort()
        # does not. So set a C handler.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, message: str) -> None:
        """Sends the other processes the reason of this one's failure; process 0 waits for them."""
        with contextlib.suppress(Exception):  # the other processes or the service may be gone
            self._give(f"{ENDED}{message}", last=True)
        if self._index == 0:
            time.sleep(GRACE_S + 3 * BEAT_S)

    def finish(self) -> None:
        """Ends this process; in process 0, waits for all others instead, and returns.

        Process 0 runs the coordination service, and jax aborts the others when this service ends.
        With `jax_enable_recoverability`, jax itself does not wait for the other processes.
        """
        if self._index == 0:
            while not self._signs.finished():
                time.sleep(BEAT_S / 10)
            # Python can crash at exit if another thread is calling jax.
            self._over.set()
            self._thread.join()
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            return
        try:
            self._give(FINISHED, last=True)
        except Exception:
            self._end(GONE)
        os._exit(0)

    def _give(self, sign: str, last: bool = False) -> None:
        with self._giving:
            if self._last is None:
                self._last = sign if last else None
                key = f"{FOLDER}/{self._index}"
                self._client.key_value_set(key, sign, allow_overwrite=True)

    def _run(self) -> None:
        for beat in itertools.count():
            with contextlib.suppress(Exception):  # `Heartbeats` reports a service without answer
                self._give(str(beat))
                found = self._client.key_value_dir_get(FOLDER)
                newest = {int(key.rpartition("/")[2]): sign for key, sign in found}
                self._signs.update(newest, time.monotonic())
            if self._last is None and (fault := self._signs.fault(time.monotonic())):
                self._end(fault)
            if self._over.wait(BEAT_S):
                return

    def _aborted(self, number: int) -> None:
        if self._last == FINISHED:
            os._exit(0)
        self._end("aborted" if self._index == 0 else GONE)

    def _end(self, fault: str) -> None:
        line = f"process {self._index} of {self._count}: {fault}; restart all processes, {RESUME}"
        os.write(2, f"qlora-jax: {printable(line)}\n".encode())
        os._exit(1)
