"""The HTTP endpoints: requests become jobs of the worker, pieces become responses."""

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qlora_jax.data.prompts import ask
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.decoder import Decoder
from qlora_jax.runtime import compilation
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve import api
from qlora_jax.serve.api import AnswerReply, ChatRequest, CompletionRequest, Problem, event
from qlora_jax.serve.door import HEALTH, Check, Door
from qlora_jax.serve.ending import LastWords
from qlora_jax.serve.engine import SamplingSettings
from qlora_jax.serve.loading import read_regular
from qlora_jax.serve.pool import Pool
from qlora_jax.serve.scheduler import AnswerPiece, Job, Refused
from qlora_jax.serve.worker import Worker
from qlora_jax.text.tokenizer import Tokenizer

T = TypeVar("T")

LEAST_BODY, TOKEN_BODY, MOST_BODY = 1 << 18, 64, 4 << 20
"""Bytes of a request: allowed by every model, by a model per token of its length, and by none."""
LARGE_BODY = 1 << 16
"""Bytes of a request from which on parsing it may take longer than others should wait."""
ENDPOINTS = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    HEALTH,
)
BODY_SECONDS = 30
"""In which a request's body must have arrived."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """What the endpoints stand on.

    Attributes:
      worker: answers.
      tokenizer: of the model.
      model: the model that adapters must fit; None compares them with none.
      vocabulary: ids are below this.
      length: most tokens of prompt and answer.
      timeout: seconds a request may take, waiting included.
      loading: whether adapters are loaded and unloaded by request.
      load_timeout: seconds that reading an adapter may take, waiting for other readers included.
      checks: of the head of each request, in this order.
      readers: read adapters. A disk that does not answer may hold them for ever, and only them.
      parsers: read requests.
      large: reads those of more than `LARGE_BODY`, one at a time, so that others need not wait.
    """

    worker: Worker
    tokenizer: Tokenizer
    model: Decoder | None
    vocabulary: int
    length: int
    timeout: float
    loading: bool
    load_timeout: float = 60.0
    checks: Sequence[Check] = ()
    readers: Pool = dataclasses.field(default_factory=lambda: Pool("adapters", threads=2))
    parsers: Pool = dataclasses.field(default_factory=lambda: Pool("requests", threads=4))
    large: Pool = dataclasses.field(default_factory=lambda: Pool("large requests", threads=1))

    @property
    def most_body(self) -> int:
        """Bytes of a request at most: those of longer ones could not be answered."""
        return min(MOST_BODY, max(LEAST_BODY, TOKEN_BODY * self.length))


def application(service: Service, cut: asyncio.Event, checks: Sequence[Check] = ()) -> Starlette:
    """The ASGI application.

    Args:
      service: what the endpoints stand on.
      cut: ends all answers when it is set.
      checks: of the head of each request, before the service's.
    """

    async def completions(request: Request) -> Response:
        return await _answer(service, request, await _parsed(service, request, CompletionRequest))

    async def chat(request: Request) -> Response:
        return await _answer(service, request, await _parsed(service, request, ChatRequest))

    async def models(request: Request) -> Response:
        names = await _ask(service, lambda scheduler: scheduler.models)
        base = names[0]
        rows = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "qlora-jax",
                "root": base,
                "parent": None if name == base else base,
                "max_model_len": service.length,
            }
            for name in names
        ]
        return JSONResponse({"object": "list", "data": rows})

    async def load(request: Request) -> Response:
        _check_loading(service)
        asked = await _parsed(service, request, api.LoadAdapter)
        adapter = await _read(service, asked.lora_path)
        await _ask(service, lambda scheduler: scheduler.load(asked.lora_name, adapter))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(request: Request) -> Response:
        _check_loading(service)
        asked = await _parsed(service, request, api.UnloadAdapter)
        await _ask(service, lambda scheduler: scheduler.unload(asked.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    async def health(request: Request) -> Response:
        if service.worker.alive:
            return JSONResponse({"status": "ok"})
        raise Problem(
            HTTPStatus.SERVICE_UNAVAILABLE, "the server has stopped answering; start it again"
        )

    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/load_lora_adapter", load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
            Route(HEALTH, health),
        ],
        middleware=[
            Middleware(LastWords, cut),
            Middleware(Door, [*checks, *service.checks]),
        ],
        exception_handlers={
            Problem: _problem,
            Refused: _problem,
            UserError: _problem,
            HTTPException: _problem,
            ClientDisconnect: _problem,
            Exception: _problem,
        },
    )
    app.router.redirect_slashes = False  # an answer without OpenAI's form
    return app


async def _problem(request: Request, error: Exception) -> Response:
    return _as_problem(error, request).response()


def _as_problem(error: Exception, request: Request | None = None) -> Problem:
    match error:
        case Problem():
            return error
        case Refused():
            status, param, code = api.REFUSALS[error.reason]
            return Problem(status, str(error), param=param, code=code)
        case HTTPException():
            status, told = HTTPStatus(error.status_code), str(error.detail)
            if request is not None:
                told = _no_endpoint(status, request, error.headers or {}) or told
            return Problem(status, told, headers=error.headers)
        case UserError() | ClientDisconnect():
            return Problem(HTTPStatus.BAD_REQUEST, str(error) or "the client hung up")
        case _:
            return Problem(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "the server failed at this request; its log says why",
            )


def _no_endpoint(status: HTTPStatus, request: Request, headers: Mapping[str, str]) -> str | None:
    """What is said where no endpoint takes a request; None for other errors."""
    if status == HTTPStatus.NOT_FOUND:
        return f"there is no endpoint {request.url.path!r:.200}; there are: {', '.join(ENDPOINTS)}"
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers.get("Allow", "another method")
        return f"{request.url.path} does not take {request.method}; use {allowed}"
    return None


def _check_loading(service: Service) -> None:
    if not service.loading:
        raise Problem(
            HTTPStatus.FORBIDDEN,
            "adapters cannot be loaded by request here; start the server with --allow-loading",
        )


async def _parsed(service: Service, request: Request, kind: type[api.R]) -> api.R:
    """The body, checked.

    A browser asks before it sends JSON to another site's server, and is not answered. So no web
    page of another site posts here; one that takes this server's address for its own name is
    refused by the name (`known_hosts`).
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the content-type is not application/json; send JSON under this type",
        )
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > service.most_body:
                    raise Problem(
                        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                        f"the body is larger than {service.most_body} bytes; shorten it",
                    )
    except TimeoutError:
        raise Problem(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the body did not arrive within {BODY_SECONDS} s; send it again",
        ) from None
    if len(body) <= LARGE_BODY:
        return await service.parsers.run(api.parse, kind, body)
    return await service.large.run(_parse_large, kind, body)


def _parse_large(kind: type[api.R], body: bytearray) -> api.R:
    compilation.trim()  # of what the one before took
    return api.parse(kind, body)


async def _read(service: Service, path: str) -> LoraSet:
    try:
        async with asyncio.timeout(service.load_timeout):
            return await service.readers.run(read_regular, path, service.model)
    except TimeoutError:
        raise Problem(
            HTTPStatus.GATEWAY_TIMEOUT,
            f"{path}: not read within {service.load_timeout:g} s; see whether its disk answers",
            code="timeout",
        ) from None


async def _ask(service: Service, function: Callable[[Any], T]) -> T:
    return await asyncio.wrap_future(service.worker.call(function))


async def _answer(
    service: Service, request: Request, asked: CompletionRequest | ChatRequest
) -> Response:
    pieces: asyncio.Queue[AnswerPiece | Refused] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def listen(piece: AnswerPiece | Refused) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    prompt = await service.parsers.run(_prompt, service, asked)
    limit = asked.limit if isinstance(asked, ChatRequest) else asked.max_tokens
    job = Job(
        prompt=prompt,
        model=asked.model,
        max_tokens=limit or max(1, service.length - len(prompt)),
        settings=SamplingSettings(
            asked.temperature,
            asked.top_p,
            secrets.randbits(32) if asked.seed is None else asked.seed,
        ),
        stop=asked.stop,
        timeout=service.timeout,
        listen=listen,
    )
    reply = AnswerReply(asked, len(prompt))

    def cancel() -> None:
        service.worker.call(lambda scheduler: scheduler.cancel(job))

    try:
        await _ask(service, lambda scheduler: scheduler.submit(job))
        if asked.stream:
            first = await _unless_gone(request, _next(pieces))
            return _Stream(_events(reply, first, pieces), cancel)
        return JSONResponse(await _unless_gone(request, _collect(reply, pieces)))
    except BaseException:
        cancel()
        raise


def _prompt(service: Service, asked: CompletionRequest | ChatRequest) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(asked, ChatRequest):
        if not tokenizer.has_chat_template:
            raise Problem(
                HTTPStatus.BAD_REQUEST,
                "the model has no chat template; send a prompt to /v1/completions",
                param="messages",
            )
        return tokenizer.encode(tokenizer.render(asked.conversation, True))
    if isinstance(asked.prompt, str):
        ids = ask(asked.prompt, tokenizer, template="none").ids
    else:
        ids = asked.prompt
    if not ids:
        raise Problem(
            HTTPStatus.BAD_REQUEST, "the prompt has no tokens; give some text", param="prompt"
        )
    if not 0 <= min(ids) <= max(ids) < service.vocabulary:
        raise Problem(
            HTTPStatus.BAD_REQUEST,
            f"the prompt holds an id outside the vocabulary of {service.vocabulary}; use the "
            "model's own tokenizer",
            param="prompt",
        )
    return ids


async def _next(pieces: asyncio.Queue[AnswerPiece | Refused]) -> AnswerPiece:
    piece = await pieces.get()
    if isinstance(piece, Refused):
        raise piece
    return piece


async def _collect(
    reply: AnswerReply, pieces: asyncio.Queue[AnswerPiece | Refused]
) -> dict[str, Any]:
    text = ""
    while True:
        piece = await _next(pieces)
        text += piece.text
        if piece.finish:
            return reply.whole(text, piece.tokens, piece.finish)


async def _unless_gone(request: Request, result: Awaitable[T]) -> T:
    """The result, or ClientDisconnect as soon as the client hangs up."""
    wanted, gone = asyncio.ensure_future(result), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise ClientDisconnect
    finally:
        for task in (wanted, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _events(
    reply: AnswerReply, piece: AnswerPiece, pieces: asyncio.Queue[AnswerPiece | Refused]
) -> AsyncIterator[str]:
    """Server-sent events from the first piece to [DONE], or to an error."""
    if first := reply.first():
        yield event(first)
    try:
        while not piece.finish:
            yield event(reply.piece(piece.text, None))
            piece = await _next(pieces)
    except Refused as e:
        yield event(_as_problem(e).body())
        return
    yield event(reply.piece(piece.text, piece.finish))
    if usage := reply.usage(piece.tokens):
        yield event(usage)
    yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; `on_end` is called however they end, a client that hangs up included."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], Any]):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
