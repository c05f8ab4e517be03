"""Runs the HTTP server: takes the port, accepts connections, stops on a signal."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn

from qlora_jax.runtime.errors import RunFailed, Terminated, UserError
from qlora_jax.serve.app import Service, application
from qlora_jax.serve.connections import MOST, SURPLUS, Connection, ConnectionLimiter, not_surplus
from qlora_jax.serve.signals import signals


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on a port; port 0 picks a free one.

    Clients that connect before the server runs wait until it runs.

    Raises:
      UserError: the port is in use or not permitted, or the host is not an address of this machine.
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
        raise UserError(
            f"--host {host} --port {port}: {e.strerror or e}; give another host or port"
        ) from None
    return listener


def address(listener: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    service: Service,
    listener: socket.socket,
    *,
    grace: float,
    connections: int = MOST,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGINT or SIGTERM, then completes running answers; a second signal ends at once.

    Args:
      service: objects and settings that the endpoints use. `serve` starts its worker and closes it
        at the end. If the worker's current step does not end in time, for example a compilation,
        the worker's thread stays alive.
      listener: socket from `listen`; closed at the end.
      grace: seconds from the signal to the end of the server. Running answers may take nine tenths
        of this time, or all but one second if that is more; then each unfinished answer ends with
        an error.
      connections: largest number of connections at a time.
      on_ready: function called when the server answers requests.

    Raises:
      Terminated: a signal arrived, and the server has ended.
      RunFailed: the worker failed.
    """
    asyncio.run(_serve(service, listener, grace, connections, on_ready))


class _Server(uvicorn.Server):
    """uvicorn's server with a limit of connections and a time limit for its end.

    It does not handle signals; `_serve` does.

    Args:
      config: config of uvicorn; its application ends all open answers when `cut` is set.
      cut: event that ends all open answers (`CutOpenAnswers`).
      grace: seconds from `stop` to the end of the server.
      connections: largest number of connections at a time.

    Attributes:
      ends: time by which every connection must have ended, by the event loop's clock; set by
        `stop`. The part of `grace` after it is for the end of the process.
    """

    ends: float

    def __init__(
        self, config: uvicorn.Config, cut: asyncio.Event, *, grace: float, connections: int
    ):
        super().__init__(config)
        self._cut, self._grace, self._connections = cut, grace, connections
        self._timers: list[asyncio.TimerHandle] = []
        self._accepting: list[asyncio.Task] = []

    def stop(self) -> None:
        """Begins the end: running answers may go on until shortly before `grace` is over."""
        loop, words = asyncio.get_running_loop(), min(1, self._grace / 10)
        self.ends = loop.time() + self._grace - words / 2
        self._timers = [
            loop.call_at(self.ends - words / 2, self._cut.set),
            loop.call_at(self.ends, self._abort),
        ]
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        present = cast(set[Connection], self.server_state.connections)
        crowd = ConnectionLimiter(self._connection, present, self._connections)
        self._accepting = [asyncio.ensure_future(crowd.accept(s)) for s in sockets or []]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self._timers:
            self.stop()
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)
        for timer in self._timers:
            timer.cancel()

    def _connection(self, surplus: bool) -> Connection:
        return Connection(self.config, self.server_state, {SURPLUS: surplus})

    def _abort(self) -> None:
        """Closes connections whose clients did not read their last message, and ends the wait."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.force_exit = True


def http_server(service: Service, grace: float, connections: int = MOST) -> _Server:
    """Returns a server for the endpoints; it does not start the worker and handles no signals."""
    cut = asyncio.Event()
    config = uvicorn.Config(
        application(service, cut, [not_surplus(connections)]),
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,  # a config would close the log handlers of other libraries
        log_level="error",  # warnings report faults of clients, which could fill the log
        access_log=False,
        server_header=False,
    )
    return _Server(config, cut, grace=grace, connections=connections)


async def _serve(
    service: Service,
    listener: socket.socket,
    grace: float,
    connections: int,
    on_ready: Callable[[], None],
) -> None:
    loop, worker = asyncio.get_running_loop(), service.worker
    server = http_server(service, grace, connections)
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    worker.on_failure = failed
    async with signals(loop) as received:
        worker.start()
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        on_ready()
        stopping = asyncio.ensure_future(received.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if received.is_set():
            worker.call(lambda scheduler: scheduler.stop())
            server.stop()
        stopping.cancel()
        await serving
    worker.close(max(0, server.ends - loop.time()))
    if failures:
        raise RunFailed(f"decoding failed: {failures[0]}") from failures[0]
    raise Terminated(received.number)
