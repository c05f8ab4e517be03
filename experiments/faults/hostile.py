"""Kinds of hostile clients, and checks of the server's answers to them."""

import asyncio
import contextlib
import dataclasses
import http.client
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.faults.common import MIB

OPEN = 64
"""Largest number of hostile connections at a time."""
PATIENCE = 60.0
"""Seconds after which a hostile client reports silence as a fault."""

Steps = Iterator[bytes | float]
"""Steps of a client: it sends bytes, and it waits for a number of seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of hostile client.

    Attributes:
      group: row of the table.
      steps: function from a random generator and the folder of files to the client's steps.
      reads: whether the client reads until the server closes; if not, it closes after its steps.
      answered: whether a close without an answer is a fault.
      refused: whether an answer with status 200 is a fault.
    """

    group: str
    steps: Callable[[random.Random, Path], Steps]
    reads: bool = True
    answered: bool = True
    refused: bool = False


def request(
    body: object = b"",
    path: str = "/v1/completions",
    *,
    method: str = "POST",
    host: str = "localhost",
    length: object = None,
    further: Sequence[str] = ("Content-Type: application/json", "Connection: close"),
) -> bytes:
    """Returns an HTTP request as bytes; a body that is not bytes is encoded as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(data) if length is None else length
    head = [f"{method} {path} HTTP/1.1", f"Host: {host}", *further, f"Content-Length: {size}"]
    return "\r\n".join([*head, "", ""]).encode() + data


ASKED = {"model": "tiny", "prompt": "What does open do?", "max_tokens": 8, "temperature": 0}
MESSAGES = [{"role": "user", "content": "What is zip?"}]
CHAT = {"model": "one", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
STREAM = ASKED | {"max_tokens": 200, "stream": True}
FIELDS = [*ASKED, "messages", "max_completion_tokens", "top_p", "seed", "stop", "stream", "n"]
FIELDS += ["stream_options", "best_of", "frequency_penalty", "presence_penalty", "logit_bias"]
FIELDS += ["logprobs", "response_format", "tool_choice", "tools", "metadata", "user", "echo"]
NUMBERS = ("max_tokens", "temperature", "top_p", "seed", "n", "best_of", "presence_penalty")
WRONG: list[object] = [None, True, -1, 0, 1.5, 2**31, 2**63, 2**200, -(2**70), 1e308, "x", "", "\0"]
WRONG += [[], [[]], {}, [None], [1, "a"], {"a": {"b": []}}, [{"role": "user"}], [{"type": "text"}]]
WRONG += ["é" * 300]


def _wrong_type(rng: random.Random) -> dict[str, Any]:
    asked = rng.choice([ASKED, CHAT])
    return asked | {rng.choice(FIELDS): rng.choice(WRONG) for _ in range(rng.randint(1, 3))}


def _number(name: str, literal: bytes) -> bytes:
    """Returns a completion request's JSON with `literal` as the value of field `name`."""
    return json.dumps(ASKED | {name: "@"}).encode().replace(b'"@"', literal)


BODIES: dict[str, Callable[[random.Random], object]] = {
    "deep lists": lambda r: b"[" * r.choice([900, 9_000, 200_000]),
    "deep objects": lambda r: b'{"model":' * r.choice([900, 9_000, 200_000]),
    "deep and closed": lambda r: (n := r.choice([300, 900, 990])) and b"[" * n + b"]" * n,
    "5,000 digits": lambda r: _number(r.choice(NUMBERS), b"-" * r.randint(0, 1) + b"9" * 5000),
    "no number": lambda r: _number(
        r.choice(NUMBERS), r.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"01"])
    ),
    "wrong types": _wrong_type,
    "half a surrogate pair": lambda r: ASKED | {r.choice(FIELDS): r.choice(["\ud800", "a\udfff"])},
    "huge max_tokens": lambda r: ASKED | {"max_tokens": r.choice([255, 2**31, 2**63, 10**400])},
    "negative numbers": lambda r: ASKED | {r.choice(NUMBERS): r.choice([-1, -0.5, -(2**63) - 1])},
    "large seeds": lambda r: ASKED | {"seed": r.choice([2**32, 2**63, 2**64, 2**80])},
    "foreign ids": lambda r: ASKED | {"prompt": [1, r.choice([-1, 320, 2**31, 2**63, 2**70])]},
    "no UTF-8": lambda r: r.randbytes(r.randint(1, 2000)),
    "another UTF": lambda r: json.dumps(ASKED).encode(r.choice(["utf-16", "utf-32", "utf-8-sig"])),
    "cut": lambda r: json.dumps(CHAT).encode()[: r.randint(0, 60)],
    "characters changed": lambda r: bytes(
        r.randrange(256) if r.random() < 0.05 else byte for byte in json.dumps(CHAT).encode()
    ),
    "much text": lambda r: ASKED | {"prompt": r.choice(["a", "open zip ", "é"]) * (1 << 20)},
    "many ids": lambda r: ASKED | {"prompt": [1] * (1 << 20)},
    "many lists": lambda r: ASKED | {"metadata": [[]] * 1_000_000},
    "a long message": lambda r: CHAT | {"messages": MESSAGES * 50_000},
    "more than is taken": lambda r: ASKED | {"prompt": "a" * (5 << 20)},
}
"""Bodies of requests: malformed, or near the largest size that the server accepts."""

ZEROS = b"0" * (1 << 16)
CHUNKED = ("Content-Type: application/json", "Transfer-Encoding: chunked")


def _without_length(body: bytes, *further: str) -> bytes:
    head, _, _ = request(further=further).partition(b"\r\nContent-Length")
    return head + b"\r\n\r\n" + body


def _body_of_64_mb(rng: random.Random, folder: Path) -> Steps:
    yield request(length=1024 * len(ZEROS))
    for _ in range(1024):
        yield ZEROS


RAW: dict[str, Callable[[random.Random], bytes]] = {
    "no length": lambda r: request(ASKED, length=r.choice([-1, "+5", "1e3", "", "5, 6", "0x10"])),
    "a huge length": lambda r: request(ASKED, length=r.choice([2**63, 10**30, "9" * 5000])),
    "too small a length": lambda r: request(ASKED, length=r.randint(0, 40), further=CHUNKED[:1]),
    "two lengths": lambda r: request(ASKED, further=[*CHUNKED[:1], "Content-Length: 3"]),
    "length and chunks": lambda r: request(ASKED, further=[*CHUNKED, "Connection: close"]),
    "chunked nonsense": lambda r: _without_length(
        r.choice(
            [b"zz\r\nabc\r\n", b"-1\r\na\r\n", b"f" * 40 + b"\r\n", b"3\r\nabcdef\r\n0\r\n\r\n"]
        ),
        *CHUNKED,
    ),
    "another coding": lambda r: _without_length(b"", "Transfer-Encoding: gzip, identity"),
    "random bytes": lambda r: r.randbytes(r.randint(1, 5000)) + b"\r\n\r\n",
    "pipelined garbage": lambda r: (
        request(ASKED, further=CHUNKED[:1]) * r.randint(1, 4) + r.randbytes(500) + b"\r\n\r\n"
    ),
    "headers of 1 MB": lambda r: request(ASKED, further=["X: " + "a" * 1000] * 1000),
    "a header of 1 MB": lambda r: request(ASKED, further=["X: " + "a" * MIB]),
    "a path of 60 KB": lambda r: request(ASKED, "/" + r.choice(["a", "../", "%00"]) * 20_000),
    "unknown methods": lambda r: request(
        ASKED, method=r.choice(["PUT", "DELETE", "TRACE", "CONNECT", "PRI", "BREW", "G(T", "post"])
    ),
    "unknown paths": lambda r: request(
        ASKED,
        r.choice(["/", "/v1", "/v1/completions/", "/v1//models", "/v1/../health", "*", "/%ff%00"]),
    ),
    "another content type": lambda r: request(ASKED, further=["Content-Type: text/plain"]),
    "another protocol": lambda r: r.choice(
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /health\r\n\r\n", b"\x16\x03\x01\x02\0\r\n\r\n"]
    ),
    "upgrades": lambda r: request(
        ASKED, further=["Connection: upgrade, close", f"Upgrade: {r.choice(['websocket', 'h2c'])}"]
    ),
}
"""Requests that are invalid as HTTP, or ask for something that the server does not offer."""


def _bytewise(data: bytes, pause: float, begun: bytes = b"") -> Steps:
    yield begun
    for byte in data:
        yield bytes([byte])
        yield pause


def _hang_up(rng: random.Random, folder: Path) -> Steps:
    whole = request(rng.choice([ASKED, STREAM, CHAT]))
    yield whole[: rng.choice([len(whole), rng.randrange(len(whole))])]
    yield rng.random() / 2


WHOLE = request(ASKED)
CONNECTIONS: dict[str, tuple[Callable[[random.Random, Path], Steps], bool, bool]] = {
    "nothing said": (lambda r, f: iter([]), True, False),
    "half a head": (lambda r, f: iter([WHOLE[: r.randint(1, 40)]]), True, True),
    "a slow head": (lambda r, f: _bytewise(WHOLE, 0.3), True, True),
    "a slow body": (lambda r, f: _bytewise(WHOLE[-60:], 1.0, WHOLE[:-60]), True, True),
    "too large a length": (lambda r, f: iter([request(ASKED, length=999)]), True, True),
    "half a chunk": (lambda r, f: iter([_without_length(b"5\r\nab", *CHUNKED)]), True, True),
    "a stream not read": (lambda r, f: iter([request(STREAM), 8 * r.random()]), False, False),
    "a hang-up": (_hang_up, False, False),
}
"""Clients that are slow or leave: `steps`, `reads` and `answered` of their `Kind`."""

HOSTS = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"]
HOSTS += ["localhost@evil.example", "[::1].evil.example", "localhost,evil.example", ""]
PATHS = [
    "",
    "..",
    "/",
    "\n",
    "\0",
    "\ud800",
    "a" * 5000,
    "a/" * 2000,
    "/dev/zero",
    "/proc/self/mem",
]
PATHS += ["a_fifo", "a_zero", "fifo", "zero", "missing", "run/../missing", "~nobody-of-this-name/x"]
PATHS += ["run/../../../../../../etc/passwd"]


def _foreign_host(rng: random.Random, folder: Path) -> Steps:
    bodies = {
        "load_lora_adapter": {"lora_name": "taken", "lora_path": str(folder / "run")},
        "unload_lora_adapter": {"lora_name": "one"},
        "completions": ASKED,
    }
    path = rng.choice(["load_lora_adapter", *bodies])
    yield request(bodies[path], f"/v1/{path}", host=rng.choice(HOSTS))


def _foreign_path(rng: random.Random, folder: Path) -> Steps:
    path = rng.choice(PATHS)
    for asked in (f"{folder}/{path}", path) if path else ("",):
        yield request(
            {"lora_name": "taken", "lora_path": asked}, "/v1/load_lora_adapter", further=CHUNKED[:1]
        )
    yield request(method="GET", path="/v1/none")  # closes


def _body(make: Callable[[random.Random], object]) -> Callable[[random.Random, Path], Steps]:
    paths = "/v1/completions", "/v1/chat/completions"
    return lambda rng, folder: iter([request(make(rng), rng.choice(paths))])


def _raw(make: Callable[[random.Random], bytes]) -> Callable[[random.Random, Path], Steps]:
    return lambda rng, folder: iter([make(rng)])


GROUPS = MALFORMED, SLOW, FOREIGN = "malformed requests", "connections", "foreign hosts and paths"
KINDS = {
    **{name: Kind(group=MALFORMED, steps=_body(make)) for name, make in BODIES.items()},
    **{name: Kind(group=MALFORMED, steps=_raw(make)) for name, make in RAW.items()},
    "a body of 64 MB": Kind(group=MALFORMED, steps=_body_of_64_mb, answered=False),
    **{
        name: Kind(group=SLOW, steps=steps, reads=reads, answered=answered)
        for name, (steps, reads, answered) in CONNECTIONS.items()
    },
    "a foreign host": Kind(group=FOREIGN, steps=_foreign_host, refused=True),
    "a foreign path": Kind(group=FOREIGN, steps=_foreign_path, refused=True),
}


async def _visit(port: int, kind: Kind, rng: random.Random, folder: Path) -> str | None:
    """Plays one client; returns what is wrong with the server's answers, or None."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = bytearray()
    heard = asyncio.ensure_future(_listen(reader, said)) if kind.reads else asyncio.Future()
    try:
        async with asyncio.timeout(PATIENCE):
            await _play(writer, kind.steps(rng, folder), heard)
            whole = await heard if kind.reads else True
    except TimeoutError:
        return f"not closed within {PATIENCE:g} s, after {bytes(said[:60])!r}"
    finally:
        heard.cancel()
        writer.transport.abort()
    return wrong(bytes(said), kind, whole)


async def _play(writer: asyncio.StreamWriter, steps: Steps, heard: asyncio.Future) -> None:
    with contextlib.suppress(ConnectionError):
        for step in steps:
            if heard.done():
                return
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            else:
                await asyncio.wait([heard], timeout=step)


async def _listen(reader: asyncio.StreamReader, said: bytearray) -> bool:
    """Appends the server's bytes to `said`; returns whether the server closed without a reset."""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            said += part
        return True
    return False


class _File(io.BytesIO):
    """The bytes of a connection, as a socket from which http.client reads answers."""

    def makefile(self, mode: str) -> "_File":
        return self

    def close(self) -> None:
        """Does nothing, so that the next answer can be read."""


def wrong(said: bytes, kind: Kind, whole: bool) -> str | None:
    """Returns what is wrong with all bytes that a connection received, or None.

    A connection that was reset (not `whole`) may lose its answer: the server resets a client that
    still sends when the server refuses it.
    """
    file, count = _File(said), 0
    while file.tell() < len(said):
        try:
            response = http.client.HTTPResponse(file)  # type: ignore[arg-type]
            response.begin()
            fault = _wrong_answer(response.status, response.read(), kind.refused)
        except http.client.HTTPException as e:
            fault = f"no whole answer of HTTP: {e!r}" if whole else None
            return fault and f"{fault}: {said[:60]!r}"
        if fault:
            return fault
        count += 1
    return "closed without an answer" if whole and kind.answered and not count else None


def _wrong_answer(status: int, body: bytes, refused: bool) -> str | None:
    shown = f"{status} {body[:200]!r}"
    if status == 200 and not refused:
        right = body.startswith((b"{", b"Success")) or body.endswith(b"data: [DONE]\n\n")
        return None if right else f"not a valid answer: {shown}"
    if not 400 <= status < 600 or status == 500:
        return f"not refused as a client's error: {shown}"
    try:
        return None if isinstance(json.loads(body)["error"]["message"], str) else shown
    except (ValueError, KeyError, TypeError):
        return f"not an error of OpenAI's form: {shown}"


Found = list[tuple[str, str | None]]
"""Kind of each hostile client, and what was wrong with the answers that it got."""


def attack(port: int, names: Sequence[str], rate: float, seed: str, folder: Path) -> Found:
    """Runs one hostile client per name, `rate` new ones per second; returns what they found."""
    return asyncio.run(_attack(port, names, rate, random.Random(seed), folder))


def names(rng: random.Random, count: int) -> list[str]:
    """Returns names of kinds in random order, each at least once."""
    names = [*KINDS, *rng.choices(list(KINDS), k=max(0, count - len(KINDS)))]
    rng.shuffle(names)
    return names


async def _attack(
    port: int, names: Sequence[str], rate: float, rng: random.Random, folder: Path
) -> Found:
    found: Found = []
    room = asyncio.Semaphore(OPEN)

    async def visit(name: str, own: random.Random) -> None:
        try:
            found.append((name, await _visit(port, KINDS[name], own, folder)))
        except OSError as e:
            found.append((name, f"not connected: {e}"))
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        for name in names:
            await room.acquire()
            tasks.create_task(visit(name, random.Random(rng.random())))
            await asyncio.sleep(1 / rate)
    return found
