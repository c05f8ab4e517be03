"""The last words of a server to those who still wait for an answer."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_jax.serve.api import REFUSALS, Problem, event

CUT = "the server is stopping and cut this answer; ask again once it is back"
WORDS_SECONDS = 0.5
"""In which a client must take the last words; it may have stopped reading."""
STREAM = b"text/event-stream"


class LastWords:
    """ASGI middleware: ends every answer once `cut` is set, whatever it waits for.

    An answer that has not begun becomes an error of OpenAI's form; a stream's last event is one.

    Args:
      app: the application.
      cut: set when the server has no more time.
    """

    def __init__(self, app: ASGIApp, cut: asyncio.Event):
        self._app, self._cut = app, cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = _Said(send)
        answering = asyncio.ensure_future(self._app(scope, receive, said))
        cut = asyncio.ensure_future(self._cut.wait())
        # Cancelled from outside: the event loop ends without `cut`, as after a second signal.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({answering, cut}, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()
        # the event loop's end cancels both, in any order
        if answering.done() and not answering.cancelled():
            return answering.result()
        answering.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WORDS_SECONDS):
                await asyncio.gather(answering, return_exceptions=True)
                await said.finish(scope, receive)


class _Said:
    """Passes an answer on and remembers how far it came."""

    def __init__(self, send: Send):
        self._send = send
        self._begun = self._ended = self._stream = False

    async def __call__(self, message: Message) -> None:
        await self._send(message)  # who is cancelled within has sent nothing
        if message["type"] == "http.response.start":
            self._begun = True
            media = dict(message["headers"]).get(b"content-type", b"")
            self._stream = media.startswith(STREAM)
        else:
            self._ended = not message.get("more_body", False)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Says why the answer ends here."""
        status, param, code = REFUSALS["stopping"]
        problem = Problem(status, CUT, param=param, code=code)
        if not self._begun:
            await problem.response()(scope, receive, self._send)
        elif self._stream and not self._ended:
            body = event(problem.body()).encode()
            await self._send({"type": "http.response.body", "body": body})
