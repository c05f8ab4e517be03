"""The processes of a run on several hosts: which one this is, and what they agree on.

They meet through the coordination service of `jax.distributed`, which the first process runs. This
module imports no jax before there are several.
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
from qlora_jax.runtime.liveness import RESUME, SILENT_S, Watch
from qlora_jax.runtime.versions import versions

T = TypeVar("T")

SIZES = ("JAX_NUM_PROCESSES", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables that hold the number of processes: our own, torchrun's, SLURM's and Open MPI's."""

OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")

WAIT_MS = 30 * 60 * 1000
"""How long a process waits for what another one does, such as deleting an old run."""

NEVER_S = 24 * 60 * 60
"""After which jax itself aborts a process of which others have died, without a clear line."""

DONE, FAULT = "done", "fault: "
"""How the first process tells the others that an action ended; an error's text follows `FAULT`."""

AHEAD = 3
"""Steps from a signal to the one after which all stop: no process is further ahead than that."""

_numbers = itertools.count()
_here = (1, 0)
_watch: Watch | None = None


def several() -> bool:
    """Whether the environment says that this is one of several processes."""
    return any(os.environ.get(name, "1") not in ("", "0", "1") for name in SIZES)


def join() -> None:
    """Makes this process one of the run's; before jax starts.

    The environment says which: `OWN`, `TORCHRUN`, or what jax finds by itself (SLURM, Open MPI,
    Kubernetes).

    Raises:
      UserError: the environment does not say, or the first process is not to be reached.
    """
    import jax

    global _here, _watch
    # `Watch` ends the others with a clear line where jax would abort them
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
    _watch = Watch(_client(), index(), count())


def _place() -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize` that the environment gives.

    Raises:
      UserError: a variable is no number.
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
    """Returns the number of the run's processes."""
    return _here[0]


def index() -> int:
    """Returns which of the run's processes this is, from 0."""
    return _here[1]


def is_first() -> bool:
    """Whether this is the process that writes the files of a run; a single process is."""
    return index() == 0


def name() -> str:
    """Names this process, for messages; nothing where it is the only one."""
    return f"process {index()} of {count()}: " if count() > 1 else ""


def by_first(action: Callable[[], T]) -> T | None:
    """Has the first process do something while the others wait.

    Returns:
      The action's result; None in other processes.

    Raises:
      UserError: the action's, in every process.
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
    """Makes sure that values and the code are the same in all processes, and waits for all.

    Args:
      values: name of a value, such as configs, to the value.

    Raises:
      UserError: one differs from the first process's, in every process.
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

    A process cannot be more than `AHEAD` - 1 steps before another one, since a step needs all.

    Args:
      asked: the signal that this process got, or None.
      step: that is done.

    Returns:
      The signal, if it is now that all stop for it.
    """
    if count() == 1:
        return asked
    key, client = "qlora_jax/stop", _client()
    if asked is not None:
        with contextlib.suppress(_error()):  # another process was first
            client.key_value_set(key, f"{step + AHEAD} {asked}")
    try:
        last, number = map(int, client.key_value_try_get(key).split())
    except _error():  # no signal yet
        return None
    return number if step >= last else None


def code_digest() -> str:
    """Returns a hash of this package's code and of the versions of others, as hex."""
    digest = hashlib.sha256(repr(versions()).encode())
    for path in sorted(paths.PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(paths.PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Within it, an error of a collective is that of a process which ended.

    Raises:
      RunFailed: another process ended, or cannot be reached.
    """
    try:
        yield
    except Exception as e:
        if count() == 1 or not isinstance(e, _error()) or FULL_MEMORY in str(e):
            raise
        raise RunFailed(
            f"another process of the run ended or cannot be reached ({first_line(e)}); start all "
            f"again, {RESUME}"
        ) from e


def tell(message: str) -> None:
    """Tells the other processes why this one ends, so that they end too."""
    if _watch is not None:
        _watch.tell(message)


def leave(code: int) -> None:
    """Ends this process where it is one of several.

    Does nothing for a process alone, and returns in the first process of a run that went well,
    once the others have ended.

    Args:
      code: exit code; other than 0, the others are not waited for.
    """
    if _watch is None:
        return
    if code:
        os._exit(code)
    _watch.finish()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within it, the first process alone prints."""
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
    """Sends what libraries print to stdout by themselves, as gloo does, to stderr."""
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
