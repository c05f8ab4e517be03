"""Threads that do blocking work for the event loop and never keep the process alive."""

import asyncio
import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """A few daemon threads.

    Python waits at its end for the threads of asyncio's and concurrent.futures' pools; one that
    reads from a disk that does not answer would keep the process for ever.

    Args:
      name: of the threads.
      threads: most that there are; each starts when it is needed.
    """

    def __init__(self, name: str, threads: int):
        self._name, self._most, self._count = name, threads, 0
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    async def run(self, function: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> T:
        """Calls the function in a thread and waits for its result.

        Whoever is cancelled while waiting leaves the thread in its call; a call that has not begun
        never begins.

        Raises:
          Exception: what the function raises.
        """
        future: Future[T] = Future()
        try:
            self._put(future, function, arguments, options)
            return await asyncio.wrap_future(future)
        finally:
            # An exception holds this frame: without the cycle, what it holds goes at once.
            del future, arguments, options

    def _put(
        self, future: Future[T], function: Callable[..., T], arguments: tuple, options: dict
    ) -> None:
        self._work.put(functools.partial(_do, future, function, arguments, options))
        if not self._idle.acquire(blocking=False) and self._count < self._most:
            self._count += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()
            self._idle.release()


def _do(future: Future, function: Callable, arguments: tuple, options: dict) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments, **options))
    except BaseException as e:  # whoever waits gets it, whatever it is
        future.set_exception(e)
    finally:
        del future, function, arguments, options  # as in `run`
