"""The server's life: its port, its signals, its end."""

import asyncio
import contextlib
import errno
import math
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn

from qlora_jax.errors import RunFailed, Terminated, UserError
from qlora_jax.serve.app import Service, application
from qlora_jax.serve.scheduler import Refused

CUT = "the server is stopping and cut this answer"
LAST_WORDS = 2
"""Seconds that connections have, after running answers were cut, to tell their clients."""


def listen(host: str, port: int) -> socket.socket:
    """Takes a port; 0 is any free one. Who connects waits until the server runs.

    Raises:
      UserError: it is in use or may not be taken, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as e:
        raise UserError(
            f"--host {host}: {e.strerror or e}; give an address of this machine"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as e:
        listener.close()
        if e.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port}: in use on {host}; give another, or 0 for a free one"
            ) from None
        raise UserError(f"--host {host} --port {port}: {e.strerror or e}; give others") from None
    return listener


def address(listener: socket.socket) -> str:
    """The URL at which it is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    service: Service,
    listener: socket.socket,
    *,
    grace: float,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what runs; a second signal acts at once.

    Args:
      service: what the endpoints stand on; its worker is started here and closed at the end.
      listener: from `listen`; closed at the end.
      grace: seconds that running answers have to finish after the signal; then they are cut.
      on_ready: called when requests are answered.

    Raises:
      Terminated: by the signal, once all is finished.
      RunFailed: the worker failed.
    """
    asyncio.run(_serve(service, listener, grace, on_ready))


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(service: Service, grace: float) -> uvicorn.Server:
    """The server of the endpoints, without a worker's or a signal's life."""
    return _Server(
        uvicorn.Config(
            application(service),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(grace) + LAST_WORDS,
        )
    )


async def _serve(
    service: Service,
    listener: socket.socket,
    grace: float,
    on_ready: Callable[[], None],
) -> None:
    loop, worker, server = asyncio.get_running_loop(), service.worker, http_server(service, grace)
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    worker.on_failure = failed
    async with _signals(loop) as received:
        worker.start()
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        on_ready()
        stopping = asyncio.ensure_future(received.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if received.is_set():
            worker.call(lambda scheduler: scheduler.stop())
            cut = Refused("stopping", CUT)
            loop.call_later(grace, worker.call, lambda scheduler: scheduler.refuse_all(cut))
            server.should_exit = True
        stopping.cancel()
        await serving
    await asyncio.to_thread(worker.close)
    if failures:
        raise RunFailed(f"decoding failed: {failures[0]}") from failures[0]
    raise Terminated(received.number)


class _Received(asyncio.Event):
    """Set by a signal, whose number it keeps."""

    number = signal.SIGTERM


@contextlib.asynccontextmanager
async def _signals(loop: asyncio.AbstractEventLoop) -> AsyncIterator[_Received]:
    """Inside, the first SIGINT or SIGTERM is noted; the next acts as if nobody listened."""
    received, numbers = _Received(), (signal.SIGINT, signal.SIGTERM)

    def note(number: signal.Signals) -> None:
        received.number = number
        received.set()
        for n in numbers:
            loop.remove_signal_handler(n)

    for number in numbers:
        loop.add_signal_handler(number, note, number)
    try:
        yield received
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
