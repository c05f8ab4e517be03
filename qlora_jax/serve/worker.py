"""The thread that owns the scheduler; others talk to it by a queue."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from qlora_jax.serve.scheduler import Refused, Scheduler

T = TypeVar("T")

BROKEN = "the server failed and is stopping; start it again"


class Worker:
    """Steps a scheduler while it is busy and does what it is asked between steps.

    Args:
      scheduler: used by this thread alone from `start` on.
      on_failure: called once, in the thread, with what a step raised; the worker ends.
    """

    def __init__(
        self, scheduler: Scheduler, on_failure: Callable[[Exception], None] = lambda e: None
    ):
        self._scheduler, self.on_failure = scheduler, on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive()

    def call(self, function: Callable[[Scheduler], T]) -> Future[T]:
        """Has the thread call a function with the scheduler; a failed worker refuses."""
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
        """Ends the thread after the step it is in; jobs that are left are dropped.

        Args:
          timeout: seconds to wait for that; then the thread is left to itself. None is no limit.
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
        """Does what was asked, and waits for it while there is nothing else to do."""
        try:
            while (work := self._inbox.get(block=not self._scheduler.busy)) is not None:
                work()
        except queue.Empty:
            return True
        return False

    def _refuse_inbox(self) -> None:
        """Work that comes after the end finds the scheduler refusing."""
        self._scheduler.stop()
        while True:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                return
            if work is not None:
                work()
