"""Signs of life between the processes of a run: when one ends, all end, each with a clear line."""

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
"""Seconds between two signs of life of a process."""

SILENT_S = 20
"""Seconds without one after which a process counts as dead."""

GRACE_S = 2
"""Seconds for a process to end by itself once another one has: the reason may be its own, too."""

FOLDER = "qlora_jax/signs"
"""Begins the keys of signs in the coordination service; the number of the process follows."""

GONE = "process 0, or the network to it, is gone"
"""What is wrong where the coordination service cannot be reached."""

RESUME = "--resume goes on from the last checkpoint"

ENDED = "ended: "
"""Begins the last sign of a process that fails; why follows."""

FINISHED = "finished"
"""The last sign of a process that has done its part of the run."""


class Signs:
    """What is known of the other processes.

    Args:
      index: number of this process, from 0.
      count: number of all processes.
      now: seconds of a clock that only goes forward.
    """

    def __init__(self, index: int, count: int, now: float):
        self._others = [i for i in range(count) if i != index]
        self._answered = now
        self._newest: dict[int, tuple[str, float]] = {}

    def update(self, found: Mapping[int, str], now: float) -> None:
        """Takes note of the newest sign of each process."""
        self._answered = now
        for process, sign in found.items():
            if self._newest.get(process, ("", now))[0] != sign:
                self._newest[process] = sign, now

    def fault(self, now: float) -> str | None:
        """Returns what is wrong with another process; None where nothing is known to be."""
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
        """Whether all other processes have done their part of the run."""
        return all(self._newest.get(i, ("", 0))[0] == FINISHED for i in self._others)


class Watch:
    """A thread that gives signs of life, and ends this process once another one gives none.

    Args:
      client: of the coordination service of `jax.distributed`.
      index: number of this process, from 0.
      count: number of all processes.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self._index, self._count = client, index, count
        self._signs = Signs(index, count, time.monotonic())
        self._last: str | None = None
        self._giving, self._over = threading.Lock(), threading.Event()
        # jax aborts a process once the first one, or its host, is gone. Python's own handlers would
        # come too late: they run between two steps of the main thread, and an abort does not return
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, message: str) -> None:
        """Tells the other processes why this one fails; a first process waits until they know."""
        with contextlib.suppress(Exception):  # they may be gone, and so may the service
            self._give(f"{ENDED}{message}", last=True)
        if self._index == 0:
            time.sleep(GRACE_S + 3 * BEAT_S)

    def finish(self) -> None:
        """Ends this process; in the first one, waits for all others instead, and returns.

        The first process runs the coordination service, and jax aborts the others when it ends.
        With `jax_enable_recoverability` jax itself waits for none of them.
        """
        if self._index == 0:
            while not self._signs.finished():
                time.sleep(BEAT_S / 10)
            # Python can crash at its end while another thread calls jax
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
            with contextlib.suppress(Exception):  # without an answer `Signs` finds the fault
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
        line = f"process {self._index} of {self._count}: {fault}; start all again, {RESUME}"
        os.write(2, f"qlora-jax: {printable(line)}\n".encode())
        os._exit(1)
