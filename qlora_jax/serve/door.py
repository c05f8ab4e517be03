"""Checks the head of a request (host name, API key) before the application gets the request."""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.api import Problem

Check = Callable[[Scope], Problem | None]
"""Function that checks the head of a request; it returns the error to answer with, or None."""

HEALTH = "/health"
"""Endpoint that is answered without an API key, and also when all connections are in use."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names by which a client reaches the machine that it runs on."""

HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")
"""A Host header: a name, an IPv4 address or an IPv6 address in brackets; a port may follow."""


class RequestChecks:
    """ASGI middleware that passes a request to the application only if every check allows it.

    Args:
      app: application that answers the requests.
      checks: checks, in the order in which they are made.
    """

    def __init__(self, app: ASGIApp, checks: Sequence[Check]):
        self._app, self._checks = app, checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for check in self._checks:
            if problem := check(scope):
                return await problem.response()(scope, receive, send)
        await self._app(scope, receive, send)


def known_hosts(names: Iterable[str]) -> Check:
    """Returns a check that allows requests whose Host header is one of the names, with any port.

    The check protects against DNS rebinding: the owner of a web site can let the site's name
    resolve to 127.0.0.1. A page of the site then reaches a server on the reader's machine, and the
    browser treats both as one site. But the Host header still holds the site's name.

    Args:
      names: host names and addresses without a port; IPv6 addresses with or without brackets.
    """
    known = {_written(name) for name in names}

    def check(scope: Scope) -> Problem | None:
        given = Headers(scope=scope).get("host", "")
        if (match := HOST.fullmatch(given)) and match[1].lower() in known:
            return None
        return Problem(
            HTTPStatus.FORBIDDEN,
            f"the host {given!r} is not one of this server's; start it with --allowed-host NAME",
            code="host_not_allowed",
        )

    return check


def _written(name: str) -> str:
    """Returns a name as it is written in a Host header."""
    return f"[{name}]".lower() if ":" in name and not name.startswith("[") else name.lower()


def known_keys(keys: Iterable[str]) -> Check:
    """Returns a check that allows requests with one of the keys as `Authorization: Bearer KEY`.

    The time of a check reveals nothing about the keys: it compares digests of equal length, and
    always compares with all keys.
    """
    known = [_digest(key.encode()) for key in keys]

    def check(scope: Scope) -> Problem | None:
        if scope["path"] == HEALTH:
            return None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # starlette decodes headers as latin-1
        right = [hmac.compare_digest(given, digest) for digest in known]
        if any(right) and scheme.lower() == "bearer":
            return None
        return Problem(
            HTTPStatus.UNAUTHORIZED,
            "the API key is missing or wrong; send a key of this server as Authorization: Bearer",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    return check


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(path: str) -> list[str]:
    """Reads API keys from a file, one key per line; skips empty lines and lines that begin with #.

    Raises:
      UserError: the file cannot be read or holds no key, or a line is not a key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as e:
        raise paths.unreadable(f"--api-key-file {path}", e) from None
    except ValueError:
        raise UserError(f"--api-key-file {path}: not text in UTF-8; give another file") from None
    keys = {n: line.strip() for n, line in enumerate(lines, 1)}
    keys = {n: key for n, key in keys.items() if key and not key.startswith("#")}
    if not keys:
        raise UserError(f"--api-key-file {path}: holds no key; write one key per line")
    for n, key in keys.items():
        if len(key.split()) > 1:
            raise UserError(f"--api-key-file {path}: line {n}: a key has no spaces; one per line")
    return list(keys.values())
