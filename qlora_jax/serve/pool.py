"""Threads for blocking calls of the event loop; they do not keep the process alive."""

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
    """A few daemon threads that make blocking calls.

    The pools of asyncio and concurrent.futures are not suitable: Python waits for their threads
    before it exits, so a thread that reads from a dead disk would keep the process alive for ever.

    Args:
      name: name of the threads.
      threads: largest number of threads; a thread is started when it is needed.
    """

    def __init__(self, name: str, threads: int):
        self._name, self._most, self._count = name, threads, 0
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    async def run(self, function: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> T:
        """Calls the function in a thread and waits for its result.

        If the waiting task is cancelled, a call that has begun goes on in its thread, and a call
        that has not begun is dropped.

        Raises:
          Exception: the function raised it.
        """
        future: Future[T] = Future()
        try:
            self._put(future, function, arguments, options)
            return await asyncio.wrap_future(future)
        finally:
            # An exception refers to this frame. Deleting these names breaks the reference cycle, so
            # that the objects are freed at once.
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
    except BaseException as e:  # the waiting task gets every exception
        future.set_exception(e)
    finally:
        del future, function, arguments, options  # as in `run`
