"""Connects the processes of a run on several hosts, and makes them act together.

They communicate through the coordination service of `jax.distributed`, which process 0 runs. This
module imports jax only if there are several processes.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import FULL_MEMORY, RunFailed, UserError, first_line
from qlora_jax.runtime.liveness import RESUME, SILENT_S, HeartbeatThread
from qlora_jax.runtime.versions import versions

T = TypeVar("T")

SIZES = ("JAX_NUM_PROCESSES", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables with the number of processes: those of this package, torchrun, SLURM, Open MPI."""

OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")

WAIT_MS = 30 * 60 * 1000
"""Milliseconds that a process waits for another one, which may delete an old run."""

NEVER_S = 24 * 60 * 60
"""Seconds until jax itself would abort without a clear message; a `HeartbeatThread` is faster."""

DONE, FAULT = "done", "fault: "
"""Messages of process 0 after an action: success, or `FAULT` and the text of the error."""

AHEAD = 3
"""Steps from a signal to the common stop; no process is further ahead of another than this."""

_numbers = itertools.count()
_here = (1, 0)
_watch: HeartbeatThread | None = None


def has_several_processes() -> bool:
    """Returns whether the environment says that this is one of several processes."""
    return any(os.environ.get(name, "1") not in ("", "0", "1") for name in SIZES)


def join() -> None:
    """Connects this process to the other processes of the run; call before jax starts.

    The environment gives its index: the variables `OWN` or `TORCHRUN`, or the variables that jax
    itself reads (SLURM, Open MPI, Kubernetes).

    Raises:
      UserError: the environment gives no index, or process 0 cannot be reached.
    """
    import jax

    global _here, _watch
    # If a process dies, each other process ends by its own `HeartbeatThread`, with a clear message.
    # Without this setting, jax would abort the others.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            **_place(), heartbeat_timeout_seconds=NEVER_S, shutdown_timeout_seconds=SILENT_S
        )
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"--distributed: {first_line(e)}; start each process by srun, mpirun or torchrun, or "
            f"set {', '.join(OWN)} for each"
        ) from e
    _here = (jax.process_count(), jax.process_index())
    _watch = HeartbeatThread(_client(), index(), count())


def _place() -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize` that the environment gives.

    Raises:
      UserError: a variable is not a number.
    """
    values = {name: os.environ.get(name) for name in (*OWN, *TORCHRUN)}
    try:
        if all(values[name] for name in OWN):
            address, count, index = (str(values[name]) for name in OWN)
            return _arguments(address, int(count), int(index))
        if all(values[name] for name in TORCHRUN):
            host, port, count, index = (str(values[name]) for name in TORCHRUN)
            found = _arguments(f"{host}:{port}", int(count), int(index))
            if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
                found["local_device_ids"] = [int(os.environ["LOCAL_RANK"])]
            return found
    except ValueError as e:
        raise UserError(f"--distributed: {e}; correct {', '.join(OWN)}") from None
    return {}


def _arguments(address: str, count: int, index: int) -> dict[str, Any]:
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def count() -> int:
    """Returns the number of processes of the run."""
    return _here[0]


def index() -> int:
    """Returns the index of this process, from 0."""
    return _here[1]


def is_first() -> bool:
    """Returns whether this process writes the run's files: process 0 or a single process."""
    return index() == 0


def name() -> str:
    """Returns a name of this process for messages; an empty string for a single process."""
    return f"process {index()} of {count()}: " if count() > 1 else ""


def by_first(action: Callable[[], T]) -> T | None:
    """Runs an action in process 0 while the other processes wait.

    Returns:
      The action's result in process 0; None in the other processes.

    Raises:
      UserError: the action raised it; it is raised in every process.
    """
    if count() == 1:
        return action()
    key, client = f"qlora_jax/{next(_numbers)}", _client()
    if not is_first():
        found = client.blocking_key_value_get(key, WAIT_MS)
        if found != DONE:
            raise UserError(found.removeprefix(FAULT))
        return None
    try:
        result = action()
    except UserError as e:
        client.key_value_set(key, f"{FAULT}{e}")
        raise
    client.key_value_set(key, DONE)
    return result


def agree(values: Mapping[str, str]) -> None:
    """Checks that values and the code are the same in all processes; waits for all processes.

    Args:
      values: values to compare, by name, such as `configs`.

    Raises:
      UserError: a value differs from that of process 0; it is raised in every process.
    """
    if count() == 1:
        return
    key, client = f"qlora_jax/{next(_numbers)}", _client()
    client.key_value_set(f"{key}/{index()}", json.dumps({**values, "code": code_digest()}))
    there = [
        json_files.parse(client.blocking_key_value_get(f"{key}/{i}", WAIT_MS).encode())
        for i in range(count())
    ]
    for i, found in enumerate(there):
        for what, value in found.items():
            if value != there[0][what]:
                raise UserError(
                    f"processes 0 and {i} have different {what} ({there[0][what][:12]} and "
                    f"{value[:12]}); start all with the same command and the same files"
                )


def stop_at(asked: int | None, step: int) -> int | None:
    """Agrees with the other processes on the step after which all stop.

    A process cannot be more than `AHEAD` - 1 steps ahead of another one, because a step needs all
    processes.

    Args:
      asked: number of the signal that this process got, or None.
      step: number of the step that is finished.

    Returns:
      The number of the signal if all processes must stop now; else None.
    """
    if count() == 1:
        return asked
    key, client = "qlora_jax/stop", _client()
    if asked is not None:
        with contextlib.suppress(_error()):  # another process has set it already
            client.key_value_set(key, f"{step + AHEAD} {asked}")
    try:
        last, number = map(int, client.key_value_try_get(key).split())
    except _error():  # no signal yet
        return None
    return number if step >= last else None


def code_digest() -> str:
    """Returns a hex hash of this package's code and of the versions of other packages."""
    digest = hashlib.sha256(repr(versions()).encode())
    for path in sorted(paths.PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(paths.PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Converts errors of collectives in the `with` block to RunFailed.

    Raises:
      RunFailed: another process ended or cannot be reached.
    """
    try:
        yield
    except Exception as e:
        if count() == 1 or not isinstance(e, _error()) or FULL_MEMORY in str(e):
            raise
        raise RunFailed(
            f"another process of the run ended or cannot be reached ({first_line(e)}); restart "
            f"all processes, {RESUME}"
        ) from e


def tell_others(message: str) -> None:
    """Sends the reason why this process ends to the others, so that they end, too."""
    if _watch is not None:
        _watch.tell(message)


def leave(code: int) -> None:
    """Ends this process if it is one of several; does nothing in a single process.

    If `code` is 0, process 0 waits until the others have ended, and then returns.

    Args:
      code: exit code; if it is not 0, this process does not wait for the others.
    """
    if _watch is None:
        return
    if code:
        os._exit(code)
    _watch.finish()


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Silences all processes except process 0 in the `with` block."""
    with contextlib.ExitStack() as quiet:
        if count() > 1:
            quiet.enter_context(_own_stdout())
        if not is_first():
            nothing = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
            quiet.enter_context(contextlib.redirect_stdout(nothing))
            quiet.enter_context(contextlib.redirect_stderr(nothing))
        yield


@contextlib.contextmanager
def _own_stdout() -> Iterator[None]:
    """Redirects output of libraries, such as gloo, from file descriptor 1 to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(results):
                yield
        finally:
            results.flush()
            os.dup2(results.fileno(), 1)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _error() -> type[Exception]:
    import jax

    return jax.errors.JaxRuntimeError
