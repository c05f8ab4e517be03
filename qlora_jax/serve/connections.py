"""Limits of client connections: their number, and the time in which a client must act."""

import asyncio
import functools
import json
import logging
import resource
import socket
from collections.abc import Callable
from http import HTTPStatus

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.api import Problem
from qlora_jax.serve.door import HEALTH, Check

HEAD_SECONDS = 10
"""Seconds in which the head of a request must arrive, counted from the beginning of the connection
or from the end of the previous answer."""
READING_SECONDS = 30
"""Seconds in which a client must read some bytes of its answer; else the connection is closed."""
MOST = 1024
"""Largest number of connections at a time, if the process may open enough files."""
RETRY_SECONDS = 1.0
"""Seconds to wait after the system failed to accept a connection."""

log = logging.getLogger(__name__)


def most_connections(asked: int | None) -> int:
    """Returns the largest number of connections at a time.

    Args:
      asked: number that the user gave. None is half of the number of files that the process may
        open, at most `MOST`; the other half is for files.

    Raises:
      UserError: `asked` is more than half of the number of files that the process may open.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = MOST if files == resource.RLIM_INFINITY else max(1, files // 2)
    if asked is None:
        return min(MOST, room)
    if files != resource.RLIM_INFINITY and asked > room:
        raise UserError(
            f"--max-connections {asked}: this process may open {files} files; give at most {room}, "
            "or raise the limit with ulimit -n"
        )
    return asked


class Connection(H11Protocol):
    """The HTTP protocol of uvicorn with time limits for slow and silent clients.

    Attributes:
      since: time when the connection began to wait for a request, by the event loop's clock, in
        seconds.
    """

    _head: asyncio.TimerHandle
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head.cancel()

    def on_response_complete(self) -> None:
        # before the call of super(), which may begin the next request
        self._wait_for_head()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(HTTPStatus.BAD_REQUEST, msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(READING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    @property
    def waits(self) -> bool:
        """Whether the server waits for the client; False while it answers a complete request."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _wait_for_head(self) -> None:
        if hasattr(self, "_head"):
            self._head.cancel()
        self.since = self.loop.time()
        self._head = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        begun = self.conn.trailing_data[0]
        if begun and self.conn.our_state is h11.IDLE:
            message = (
                f"the head of the request did not arrive within {HEAD_SECONDS} s; send it again"
            )
            self._refuse(Problem(HTTPStatus.REQUEST_TIMEOUT, message))
        else:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Sends an error, if no part of a response was sent yet, and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem.body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            start = h11.Response(status_code=problem.status, headers=headers)
            for part in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part))
        self.transport.close()


class ConnectionLimiter:
    """Accepts connections, up to a limit.

    At the limit, the connection that has waited longest for a complete request is closed, so that
    silent clients cannot block others. If the server is answering on every connection, the new one
    is accepted as a surplus connection, and `not_surplus` refuses its requests.

    Args:
      make: function that returns the protocol of a new connection; its argument says whether the
        connection is a surplus connection.
      present: the open connections; uvicorn updates this set.
      most: largest number of connections.
    """

    def __init__(self, make: Callable[[bool], Connection], present: set[Connection], most: int):
        self._make, self._present, self._most = make, present, most
        self._told = False

    async def accept(self, listener: socket.socket) -> None:
        """Accepts connections of a listening socket until the task is cancelled."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
                surplus = not await self._make_room(self._most)
                await loop.connect_accepted_socket(functools.partial(self._make, surplus), accepted)
            except ConnectionError:
                continue  # the client closed the connection
            except OSError as e:
                self._tell(e)
                await self._make_room(len(self._present))
                await asyncio.sleep(RETRY_SECONDS)

    async def _make_room(self, most: int) -> bool:
        """Closes waiting connections until fewer than `most` are open.

        Returns:
          False if no more connection waits, and `most` or more are open.
        """
        while len(self._present) >= most:
            waiting = [connection for connection in self._present if connection.waits]
            if not waiting:
                return False
            min(waiting, key=lambda connection: connection.since).transport.abort()
            await asyncio.sleep(0)  # uvicorn removes the connection from `present`
        return True

    def _tell(self, error: OSError) -> None:
        if not self._told:
            log.error("cannot accept connections at present: %s; logged once", error.strerror)
        self._told = True


def not_surplus(most: int) -> Check:
    """Returns a check that refuses all requests of surplus connections, except for `HEALTH`."""

    def check(scope: Scope) -> Problem | None:
        if not scope["state"].get(SURPLUS) or scope["path"] == HEALTH:
            return None
        return Problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"all {most} connections are in use; try later",
            code="too_many_connections",
            headers={"Connection": "close"},
        )

    return check


SURPLUS = "surplus"
"""Key of a connection's state; its value says whether the connection is a surplus connection."""
