"""Engines that run the tasks of a sweep: processes of this machine, Ray, or SLURM.

An engine is a function from (tasks, setup) to an iterator. The iterator yields (task, reply) when a
task ends. Closing the iterator stops the workers.
"""

import collections
import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep.perform import CellTask, WorkerReply, failed, perform

POLL_SECONDS = 2.0
"""Seconds between two checks of SLURM's jobs."""

END_SECONDS = 10.0
"""Seconds in which a worker must end by itself, before it is killed."""


class EngineSettings(NamedTuple):
    """The settings that an engine gets besides the tasks.

    Attributes:
      jobs: largest number of tasks at a time; None: the engine chooses (`local`: one).
      resources: resources per task, by the engine's names for them.
      lock: file descriptor of the folder's lock. Local workers inherit it, so the folder stays
        locked until they end, even if the main process dies.
      folder: folder for the engine's files.
      progress: function that shows a few words about a running task.
    """

    jobs: int | None
    resources: Mapping[str, Any]
    lock: int
    folder: Path
    progress: Callable[[str], None]


class _Held:
    """A file descriptor that is passed on to a spawned process when this object is pickled."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _taken, (DupFd(self._number),)


def _taken(passed: Any) -> int:
    return passed.detach()


class _Worker:
    """A process that runs one task after another, so that later tasks reuse compiled programs."""

    def __init__(self, lock: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # not a daemon: daemons may not start processes, and a cell may need to start some
        self.process = context.Process(target=_serve, args=(theirs, _Held(lock)))
        self.process.start()
        theirs.close()
        self.task: CellTask | None = None
        self.began = 0.0

    def give(self, task: CellTask) -> None:
        self.task, self.began = task, time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # the process died; `reply` reports it
            self.pipe.send(task)

    def reply(self, progress: Callable[[str], None]) -> WorkerReply | None:
        """Returns the worker's reply to its task; None if the worker only reported its progress."""
        assert self.task is not None
        try:
            if self.pipe.poll():
                said = self.pipe.recv()
                if isinstance(said, WorkerReply):
                    return said
                progress(said)
                return None
        except (EOFError, OSError):
            pass
        self.process.join()
        return failed(self.task, _death(self.process), time.perf_counter() - self.began)

    def stop(self) -> None:
        self.pipe.close()
        if self.task is not None:
            self.process.terminate()
        self.process.join(END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def local(
    tasks: Sequence[CellTask], setup: EngineSettings
) -> Iterator[tuple[CellTask, WorkerReply]]:
    """Runs tasks in `setup.jobs` processes of this machine; if a process dies, its task failed."""
    waiting = collections.deque(tasks)
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            for _ in range(min(setup.jobs or 1, len(tasks)) - len(workers)):
                workers.append(_Worker(setup.lock))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.give(waiting.popleft())
            busy = [worker for worker in workers if worker.task]
            connection.wait([x for w in busy for x in (w.pipe, w.process.sentinel)])
            for worker in busy:
                if not (worker.pipe.poll() or worker.process.exitcode is not None):
                    continue
                reply, task = worker.reply(setup.progress), worker.task
                if reply is None or task is None:
                    continue
                worker.task = None
                if worker.process.exitcode is not None:
                    workers.remove(worker)
                yield task, reply
    finally:
        for worker in workers:
            worker.stop()


def _serve(pipe: connection.Connection, lock: int) -> None:
    """Runs the tasks that arrive on the pipe and holds the folder's lock; ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(perform(pipe.recv(), pipe.send))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _death(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    return f"worker died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def ray(tasks: Sequence[CellTask], setup: EngineSettings) -> Iterator[tuple[CellTask, WorkerReply]]:
    """Runs tasks with Ray, on the cluster at `RAY_ADDRESS`; else on a cluster started here.

    `setup.resources` are arguments of `ray.remote`, such as num_gpus.
    """
    library = _package("ray")
    if mine := not library.is_initialized():
        remote = "RAY_ADDRESS" in os.environ
        library.init(log_to_driver=False, **({} if remote else {"num_cpus": setup.jobs}))
    try:
        function = library.remote(max_retries=0, **setup.resources)(perform)
        running = {function.remote(task): task for task in tasks}
        while running:
            (ready,), _ = library.wait(list(running), num_returns=1)
            task = running.pop(ready)
            try:
                yield task, library.get(ready)
            except library.exceptions.RayError as e:
                yield task, failed(task, f"worker died ({type(e).__name__})")
    finally:
        if mine:
            library.shutdown()


def slurm(
    tasks: Sequence[CellTask], setup: EngineSettings
) -> Iterator[tuple[CellTask, WorkerReply]]:
    """Runs tasks as a SLURM job array with submitit; its files are in the folder `slurm`.

    `setup.resources` are arguments of `submitit.AutoExecutor.update_parameters`, such as
    slurm_partition or timeout_min, and `cluster` (`local`: processes of this machine).
    """
    submitit = _package("submitit", "slurm")
    resources = dict(setup.resources)
    executor = submitit.AutoExecutor(setup.folder / "slurm", cluster=resources.pop("cluster", None))
    parallel = {"slurm_array_parallelism": setup.jobs} if setup.jobs else {}
    executor.update_parameters(**resources, **parallel)
    with executor.batch():
        jobs = [executor.submit(perform, task) for task in tasks]
    try:
        running = dict(zip(jobs, tasks))
        for job in submitit.helpers.as_completed(jobs, poll_frequency=POLL_SECONDS):
            task = running.pop(job)
            try:
                yield task, job.result()
            except Exception as e:  # raised by submitit, because perform raises none
                yield task, failed(task, f"job {job.job_id} died ({type(e).__name__})")
    finally:
        for job in running:
            job.cancel()


ENGINES: Mapping[
    str, Callable[[Sequence[CellTask], EngineSettings], Iterator[tuple[CellTask, WorkerReply]]]
] = {
    "local": local,
    "ray": ray,
    "slurm": slurm,
}


def _package(name: str, extra: str | None = None) -> ModuleType:
    extra = extra or name
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"--engine {extra}: {name} is not installed; pip install 'qlora-jax[{extra}]'"
        ) from None
