"""Requests and responses of the part of OpenAI's completions API that the server supports."""

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse

from qlora_jax.runtime import json_files
from qlora_jax.serve.scheduler import Reason
from qlora_jax.text.messages import Message

IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields of a request that the server accepts and ignores."""


_NO_TOOLS = "no tools are called here; leave it out"
_ONE_ANSWER = "a request has one answer here; leave it out, and send several requests"
_NO_FIGURES = "no probabilities are returned here; leave it out"
_NO_CHANGES = "the probabilities change only by temperature and top_p; leave it out"
UNSUPPORTED: Mapping[str, str] = {
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "tool_calls": "a message holds only text here; write the call into content",
    "tool_call_id": "a message holds only text here; write the tool's result into a user's content",
    "role": "a role is system, developer, user or assistant; give one of these",
    "response_format": 'answers are text here; leave it out, or give {"type": "text"}',
    "n": _ONE_ANSWER,
    "best_of": _ONE_ANSWER,
    "logprobs": _NO_FIGURES,
    "top_logprobs": _NO_FIGURES,
    "logit_bias": _NO_CHANGES,
    "frequency_penalty": _NO_CHANGES,
    "presence_penalty": _NO_CHANGES,
    "echo": "answers come without their prompt here; leave it out",
    "suffix": "text is not inserted before a suffix here; leave it out",
    "audio": "answers are text here; leave it out",
    "modalities": "answers are text here; leave it out",
}
"""Unsupported or partly supported fields; the value says why, and what the client can do."""


class Problem(Exception):
    """An error that is sent to the client in the format of OpenAI's API.

    Args:
      status: HTTP status.
      message: message for the client, one line.
      param: name of the wrong field of the request, or None.
      code: OpenAI's name of the error, or None.
      headers: additional headers of the response.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns the JSON body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """Returns the HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def event(tree: Mapping[str, Any]) -> str:
    """Returns JSON data as one server-sent event."""
    return f"data: {json.dumps(tree)}\n\n"


REFUSALS: Mapping[Reason, tuple[HTTPStatus, str | None, str]] = {
    "unknown model": (HTTPStatus.NOT_FOUND, "model", "model_not_found"),
    "busy": (HTTPStatus.TOO_MANY_REQUESTS, None, "rate_limit_exceeded"),
    "too long": (HTTPStatus.BAD_REQUEST, None, "context_length_exceeded"),
    "timeout": (HTTPStatus.GATEWAY_TIMEOUT, None, "timeout"),
    "stopping": (HTTPStatus.SERVICE_UNAVAILABLE, None, "stopping"),
    "failed": (HTTPStatus.INTERNAL_SERVER_ERROR, None, "internal_error"),
}
"""HTTP status, parameter and code of the error, by the scheduler's reason to refuse a job."""


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _one_prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    ids = isinstance(value, list) and value and all(type(i) is int for i in value)
    if not (isinstance(value, str) or ids):
        raise PydanticCustomError(
            "prompt", "Input should be one text or one list of token ids, not empty"
        )
    return value


def _text_content(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    parts = [p for p in value if isinstance(p, dict) and p.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if len(texts) < len(value):
        raise PydanticCustomError("content", "Input should be text, or parts of type text")
    return "".join(texts)


def _without_null(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("path", "Input should hold no null character")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """The field `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(_Strict):
    """Fields that text completions and chat completions have in common.

    A field that is not supported and would change the answer is accepted only with the value that
    changes nothing.
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        BeforeValidator(_texts),
        Field(max_length=4),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    logit_bias: dict[str, float] = Field({}, max_length=0)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    max_tokens: int = Field(16, ge=1)
    best_of: Literal[1] = 1
    echo: Literal[False] = False


class Turn(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_content)]
    name: str | None = None


class TextFormat(_Strict):
    """The field `response_format`."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] = False
    response_format: TextFormat | None = None
    tool_choice: Literal["none"] = "none"

    @property
    def limit(self) -> int | None:
        """Largest number of tokens of the answer; None: the server chooses the limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def conversation(self) -> list[Message]:
        """The messages in the form that a chat template takes; role developer becomes system."""
        roles = {"developer": "system"}
        return [{"role": roles.get(t.role, t.role), "content": t.content} for t in self.messages]


class LoadAdapter(_Strict):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: Annotated[str, Field(min_length=1), AfterValidator(_without_null)]


class UnloadAdapter(_Strict):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str


R = TypeVar("R", bound=BaseModel)


SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")
"""Matches every body that may contain a surrogate: as an escape, as bytes of UTF-8, or in UTF-16
(JSON in UTF-16 always contains null bytes)."""


def parse(kind: type[R], body: bytes | bytearray) -> R:
    """Parses and checks the JSON of a request; a field with value null counts as absent.

    Raises:
      Problem: the body is not a JSON object, or a field is missing, unknown or has a wrong value.
    """
    try:
        tree = json_files.parse(body)
        if isinstance(tree, dict):
            tree = _present({key: value for key, value in tree.items() if key not in IGNORED})
            if SURROGATE.search(body):
                json.dumps(tree, ensure_ascii=False).encode()  # fails for half of a pair
    except (ValueError, RecursionError) as e:
        raise Problem(
            HTTPStatus.BAD_REQUEST, f"the body is not valid JSON ({e}); send one JSON object"
        ) from None
    if not isinstance(tree, dict):
        raise Problem(HTTPStatus.BAD_REQUEST, "the body is not a JSON object; send one")
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        errors = e.errors(include_url=False, include_context=False, include_input=False)
        # report an unknown field first: it may be the missing field, misspelled
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        where = ".".join(map(str, first["loc"]))
        message = _sentence(where, first["loc"], first["type"], first["msg"])
        raise Problem(HTTPStatus.BAD_REQUEST, message, param=where) from None


def _sentence(where: str, place: Sequence[int | str], kind: str, said: str) -> str:
    """Returns a message from an error of pydantic: what is wrong with a field, and what to do."""
    if kind == "missing":
        return f"{where} is missing; give it"
    name = next((name for name in reversed(place) if isinstance(name, str)), "")
    whole = next((name for name in reversed(place) if name in UNSUPPORTED), None)
    if whole is not None:
        return f"{where} cannot be used: {UNSUPPORTED[str(whole)]}"
    if kind == "extra_forbidden":
        return f"{where} is not supported here; leave it out"
    rule = re.sub(r"^\w+ should\b", "must", said).replace(" after validation", "")
    return f"{where} {rule}; correct {name or 'it'}"


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(v) for key, v in value.items() if v is not None}
    return [_present(v) for v in value] if isinstance(value, list) else value


class AnswerReply:
    """Builds the JSON of one answer, as one response or as the chunks of a stream.

    Args:
      request: request that is answered.
      prompt_tokens: number of tokens of the prompt.
    """

    def __init__(self, request: CompletionRequest | ChatRequest, prompt_tokens: int):
        self._request, self._prompt_tokens = request, prompt_tokens
        self._chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, tokens: int, finish: str) -> dict[str, Any]:
        """Returns the whole answer, for a request without `stream`."""
        message = {"role": "assistant", "content": text}
        content: dict[str, Any] = {"message": message} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return self._envelope(kind, content, finish) | {"usage": self._usage(tokens)}

    def first(self) -> dict[str, Any] | None:
        """Returns the first chunk of a chat, which names the role; None for text completions."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self._chat else None

    def piece(self, text: str, finish: str | None) -> dict[str, Any]:
        """Returns a chunk with new text."""
        return self._chunk({"content": text} if text else {}, finish, text)

    def usage(self, tokens: int) -> dict[str, Any] | None:
        """Returns the last chunk, with the token counts; None if the request does not want it."""
        if not self._wants_usage:
            return None
        return self._chunk({}, None) | {"choices": [], "usage": self._usage(tokens)}

    @property
    def _wants_usage(self) -> bool:
        options = self._request.stream_options
        return options is not None and options.include_usage

    def _chunk(self, delta: dict[str, Any], finish: str | None, text: str = "") -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._chat else {"text": text}
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        usage = {"usage": None} if self._wants_usage else {}
        return self._envelope(kind, content, finish) | usage

    def _envelope(self, kind: str, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "choices": [choice],
        }

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }
