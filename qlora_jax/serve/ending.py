"""Ends the open answers with an error message when the server stops."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_jax.serve.api import REFUSALS, Problem, event

CUT = "the server is stopping and cut this answer; ask again once it is back"
WORDS_SECONDS = 0.5
"""Seconds in which a client must read the error; a client may have stopped reading."""
STREAM = b"text/event-stream"


class CutOpenAnswers:
    """ASGI middleware that ends every open answer with an error as soon as `cut` is set.

    The error has the format of OpenAI's API. It is the whole response if no part of the response
    was sent yet, and the last event of a stream that was begun.

    Args:
      app: application that answers the requests.
      cut: event that is set when the server has no more time.
    """

    def __init__(self, app: ASGIApp, cut: asyncio.Event):
        self._app, self._cut = app, cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = _Said(send)
        answering = asyncio.ensure_future(self._app(scope, receive, said))
        cut = asyncio.ensure_future(self._cut.wait())
        # The loop cancels this task if it ends before `cut` is set, such as after a second signal.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({answering, cut}, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()
        # when the event loop ends, it cancels both tasks, in any order
        if answering.done() and not answering.cancelled():
            return answering.result()
        answering.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WORDS_SECONDS):
                await asyncio.gather(answering, return_exceptions=True)
                await said.finish(scope, receive)


class _Said:
    """A `send` function that also records which parts of the response were sent."""

    def __init__(self, send: Send):
        self._send = send
        self._begun = self._ended = self._stream = False

    async def __call__(self, message: Message) -> None:
        await self._send(message)  # if cancelled here, nothing was sent
        if message["type"] == "http.response.start":
            self._begun = True
            media = dict(message["headers"]).get(b"content-type", b"")
            self._stream = media.startswith(STREAM)
        else:
            self._ended = not message.get("more_body", False)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Sends the error that says why the answer ends."""
        status, param, code = REFUSALS["stopping"]
        problem = Problem(status, CUT, param=param, code=code)
        if not self._begun:
            await problem.response()(scope, receive, self._send)
        elif self._stream and not self._ended:
            body = event(problem.body()).encode()
            await self._send({"type": "http.response.body", "body": body})
