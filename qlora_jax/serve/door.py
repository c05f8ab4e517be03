"""Who is answered: checks of a request's head, before anything else is done for it."""

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
"""Looks at the head of a request; a problem is its answer."""

HEALTH = "/health"
"""The endpoint that is answered without a key, and when all connections are in use."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What a client calls the machine that it runs on."""

HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")
"""A Host header: name, IPv4 address or IPv6 address in brackets; perhaps a port."""


class Door:
    """ASGI middleware: a request goes on to the application if every check lets it.

    Args:
      app: the application.
      checks: in the order they are asked.
    """

    def __init__(self, app: ASGIApp, checks: Sequence[Check]):
        self._app, self._checks = app, checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for check in self._checks:
            if problem := check(scope):
                return await problem.response()(scope, receive, send)
        await self._app(scope, receive, send)


def known_hosts(names: Iterable[str]) -> Check:
    """Lets requests in whose Host header is one of the names, with any port.

    A web page may point its own name at 127.0.0.1 (DNS rebinding). Its requests then reach a
    server on its reader's machine, and the browser takes the two for one site. The Host header
    still holds the page's name.

    Args:
      names: host names and addresses without a port; of IPv6 with or without brackets.
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
    """A name as a Host header has it."""
    return f"[{name}]".lower() if ":" in name and not name.startswith("[") else name.lower()


def known_keys(keys: Iterable[str]) -> Check:
    """Lets requests in that bring one of the keys as `Authorization: Bearer KEY`.

    How long a comparison takes tells nothing about a key: digests of equal length are compared,
    with all keys each time.
    """
    known = [_digest(key.encode()) for key in keys]

    def check(scope: Scope) -> Problem | None:
        if scope["path"] == HEALTH:
            return None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # as starlette decoded it
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
    """The keys in a file: one in a line; empty lines and lines that begin with # do not count.

    Raises:
      UserError: the file cannot be read or holds no key, or a line is no key.
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
        raise UserError(f"--api-key-file {path}: holds no key; write one in a line")
    for n, key in keys.items():
        if len(key.split()) > 1:
            raise UserError(f"--api-key-file {path}: line {n}: a key holds no space; one in a line")
    return list(keys.values())
