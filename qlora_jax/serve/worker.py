"""The thread that owns the scheduler; other threads send it functions through a queue."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from qlora_jax.serve.scheduler import Refused, Scheduler

T = TypeVar("T")

BROKEN = "the server failed and is stopping; start it again"


class Worker:
    """A thread that steps a scheduler and, between two steps, calls the functions sent to it.

    Args:
      scheduler: scheduler that only this thread uses after `start`.
      on_failure: function called once, in this thread, with the exception that a step raised. The
        thread then ends.
    """

    def __init__(
        self, scheduler: Scheduler, on_failure: Callable[[Exception], None] = lambda e: None
    ):
        self._scheduler, self.on_failure = scheduler, on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, so that requests are answered."""
        return self._thread.is_alive()

    def call(self, function: Callable[[Scheduler], T]) -> Future[T]:
        """Calls a function with the scheduler, in the worker's thread.

        If the worker's thread has ended, the calling thread calls the function, and the scheduler
        refuses new jobs.
        """
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._scheduler))
            except Exception as e:
                future.set_exception(e)

        self._inbox.put(work)
        if self._ended.is_set():
            self._refuse_inbox()
        return future

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread after its current step; unfinished jobs are dropped.

        Args:
          timeout: seconds to wait for the end of the thread. After them the method returns and
            the thread may still run. None is no limit.
        """
        self._inbox.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while self._answer_inbox():
                if self._scheduler.busy:
                    self._scheduler.step()
        except Exception as e:
            self._scheduler.refuse_all(Refused("failed", BROKEN))
            self.on_failure(e)
        finally:
            self._ended.set()
            self._refuse_inbox()

    def _answer_inbox(self) -> bool:
        """Calls the functions of the queue, and waits for one if the scheduler has no jobs.

        Returns:
          False after `close`.
        """
        try:
            while (work := self._inbox.get(block=not self._scheduler.busy)) is not None:
                work()
        except queue.Empty:
            return True
        return False

    def _refuse_inbox(self) -> None:
        """Calls the functions left in the queue with a scheduler that refuses new jobs."""
        self._scheduler.stop()
        while True:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                return
            if work is not None:
                work()
