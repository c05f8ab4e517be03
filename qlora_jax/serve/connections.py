"""Connections of clients: how many there are, and how long one may take to say what it wants."""

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
"""In which the head of a request must have arrived, counted from the connection's beginning or
from the answer before."""
READING_SECONDS = 30
"""In which a client must take a part of its answer, before the connection is closed."""
MOST = 1024
"""Connections at a time, where the process may open files enough."""
RETRY_SECONDS = 1.0
"""Until a connection is accepted again after the system could not give one."""

log = logging.getLogger(__name__)


def most_connections(asked: int | None) -> int:
    """How many connections there may be at a time.

    Args:
      asked: by the user; None is half of the files that the process may open, at most `MOST`. The
        other half is for files.

    Raises:
      UserError: the process may not open so many files.
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
    """uvicorn's protocol with limits for clients that are slow or say nothing.

    Attributes:
      since: when it began to wait for a request, in the event loop's seconds.
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
        # first, since the next request may be here already
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
        """Whether the client has no whole request here that is being answered."""
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
        """Answers in place of the application, if nothing is answered yet, and closes."""
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


class Crowd:
    """Accepts connections, a limited number at a time.

    At the limit, the connection that has waited longest without a whole request makes room: so
    clients that connect and say nothing keep nobody out. Where every connection is being answered,
    a further one is accepted as surplus, for `not_surplus` to refuse.

    Args:
      make: a new connection's protocol; its argument is whether it is surplus.
      present: the connections that there are; kept by uvicorn.
      most: how many there may be.
    """

    def __init__(self, make: Callable[[bool], Connection], present: set[Connection], most: int):
        self._make, self._present, self._most = make, present, most
        self._told = False

    async def accept(self, listener: socket.socket) -> None:
        """Accepts until it is cancelled."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
                surplus = not await self._make_room(self._most)
                await loop.connect_accepted_socket(functools.partial(self._make, surplus), accepted)
            except ConnectionError:
                continue  # the client has left
            except OSError as e:
                self._tell(e)
                await self._make_room(len(self._present))
                await asyncio.sleep(RETRY_SECONDS)

    async def _make_room(self, most: int) -> bool:
        """Closes connections until there are fewer than `most`; False if all are answered."""
        while len(self._present) >= most:
            waiting = [connection for connection in self._present if connection.waits]
            if not waiting:
                return False
            min(waiting, key=lambda connection: connection.since).transport.abort()
            await asyncio.sleep(0)  # then it has left `present`
        return True

    def _tell(self, error: OSError) -> None:
        if not self._told:
            log.error("connections are not accepted for now: %s; this is said once", error.strerror)
        self._told = True


def not_surplus(most: int) -> Check:
    """Refuses what comes by a surplus connection; only HEALTH is answered there."""

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
"""The key of a connection's state that says so."""
