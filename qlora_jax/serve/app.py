"""The HTTP endpoints: turn requests into jobs of the worker, and answers into responses."""

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
from qlora_jax.serve.door import HEALTH, Check, RequestChecks
from qlora_jax.serve.ending import CutOpenAnswers
from qlora_jax.serve.engine import SamplingSettings
from qlora_jax.serve.loading import read_regular
from qlora_jax.serve.pool import Pool
from qlora_jax.serve.scheduler import AnswerPiece, Job, Refused
from qlora_jax.serve.worker import Worker
from qlora_jax.text.tokenizer import Tokenizer

T = TypeVar("T")

LEAST_BODY, TOKEN_BODY, MOST_BODY = 1 << 18, 64, 4 << 20
"""Limit of a request's size in bytes: smallest limit, bytes per position, largest limit."""
LARGE_BODY = 1 << 16
"""Size in bytes above which a request is parsed in the pool `Service.large`, because parsing may
take long."""
ENDPOINTS = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    HEALTH,
)
BODY_SECONDS = 30
"""Seconds in which the body of a request must arrive."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """The objects and settings that the endpoints use.

    Attributes:
      worker: worker that generates the answers.
      tokenizer: tokenizer of the model.
      model: model that loaded adapters must fit; None: adapters are not compared with a model.
      vocabulary: size of the vocabulary; token ids are smaller.
      length: largest number of tokens of prompt and answer together.
      timeout: seconds in which a request must be answered, including the time in the queue.
      loading: whether clients may load and unload adapters.
      load_timeout: seconds in which an adapter must be read, including the wait for a free reader.
      checks: checks of the head of each request, in the order in which they are made.
      readers: threads that read adapters. A dead disk may block these threads, but no others.
      parsers: threads that parse requests.
      large: one thread that parses requests above `LARGE_BODY`, so that smaller ones do not wait.
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
        """Largest size of a request in bytes; a longer prompt could not be answered."""
        return min(MOST_BODY, max(LEAST_BODY, TOKEN_BODY * self.length))


def application(service: Service, cut: asyncio.Event, checks: Sequence[Check] = ()) -> Starlette:
    """Returns the ASGI application.

    Args:
      service: objects and settings that the endpoints use.
      cut: event that ends all open answers when it is set.
      checks: checks of the head of each request, made before the checks of `service`.
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
            Middleware(CutOpenAnswers, cut),
            Middleware(RequestChecks, [*checks, *service.checks]),
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
    app.router.redirect_slashes = False  # a redirect would not have the format of OpenAI's API
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
    """Returns a message if no endpoint takes the request; None for other errors."""
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
    """Reads, parses and checks the body of a request; its content-type must be application/json.

    This content-type keeps out web pages of other sites: before a browser sends JSON to another
    site, it asks that site for permission (a CORS preflight request), and this server never gives
    it. A page whose own name resolves to this server's address does not need the permission; the
    check of the Host header (`known_hosts`) refuses such a page.
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
    compilation.trim()  # return the memory of the previous large request to the system
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
        with contextlib.suppress(RuntimeError):  # if the server has closed the loop
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
    """Returns the result, or raises ClientDisconnect as soon as the client disconnects."""
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
    """Yields the server-sent events of an answer; the last is [DONE] or an error."""
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
    """A response of server-sent events; calls `on_end` at its end or if the client disconnects."""

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
