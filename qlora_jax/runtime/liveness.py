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

RESUME = "--resume goes on from the last checkpoint"

ENDED = "ended: "
"""Begins the last sign of a process that ends; why follows."""


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
            if not sign.startswith(ENDED) and now - since > SILENT_S:
                return f"process {process} has given no sign of life for {SILENT_S} s"
        return None


class Watch:
    """A thread that gives signs of life, and ends this process once another one gives none.

    Args:
      client: of the coordination service of `jax.distributed`.
      index: number of this process, from 0.
      count: number of all processes.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self._index, self._count = client, index, count
        self._told = False
        # jax aborts a process once the first one, or its host, is gone. Python's own handlers would
        # come too late: they run between two steps of the main thread, and an abort does not return
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
        threading.Thread(target=self._run, daemon=True).start()

    def tell(self, message: str) -> None:
        """Tells the other processes why this one ends; a first process waits until they know."""
        self._told = True
        with contextlib.suppress(Exception):  # they may be gone, and so may the service
            self._give(f"{ENDED}{message}")
        if self._index == 0:
            time.sleep(GRACE_S + 3 * BEAT_S)

    def _give(self, sign: str) -> None:
        self._client.key_value_set(f"{FOLDER}/{self._index}", sign, allow_overwrite=True)

    def _run(self) -> None:
        signs = Signs(self._index, self._count, time.monotonic())
        for beat in itertools.count():
            with contextlib.suppress(Exception):  # without an answer `signs` finds the fault
                if not self._told:
                    self._give(str(beat))
                found = self._client.key_value_dir_get(FOLDER)
                newest = {int(key.rpartition("/")[2]): sign for key, sign in found}
                signs.update(newest, time.monotonic())
            if not self._told and (fault := signs.fault(time.monotonic())):
                self._end(fault)
            time.sleep(BEAT_S)

    def _aborted(self, number: int) -> None:
        gone = "aborted" if self._index == 0 else "process 0, or the network to it, is gone"
        self._end(gone)

    def _end(self, fault: str) -> None:
        line = f"process {self._index} of {self._count}: {fault}; start all again, {RESUME}"
        os.write(2, f"qlora-jax: {printable(line)}\n".encode())
        os._exit(1)
