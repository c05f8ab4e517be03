"""Tests connections that send nothing, little or nonsense, or do not read, and too many of them."""

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import resource
import socket
import time

import pytest
from slow_service import connect, heard, post, raw, say_much, served

from qlora_jax.runtime.errors import UserError
from qlora_jax.serve import connections
from qlora_jax.serve.connections import ConnectionLimiter, most_connections

HALF = b"GET /health HTTP/1.1\r\nHost: x\r\nX-"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
ASKS = post("/v1/completions", {"model": "base", "prompt": "a", "max_tokens": 2})


@pytest.fixture
def quick(monkeypatch):
    """Sets the time limit of a request's head to half a second."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)


def answer(connection):
    """Returns status and error message; the connection must hold one whole answer, then end."""
    head, _, body = heard(connection).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def health(running):
    """Returns the first 12 bytes of /health's answer on a new connection."""
    with connect(running, HEALTH) as connection:
        return connection.recv(1000)[:12]


def test_half_a_head_gets_408(text, quick):
    with served(text) as running, connect(running, HALF) as connection:
        start = time.monotonic()
        assert answer(connection) == (
            408,
            "the head of the request did not arrive within 0.5 s; send it again",
        )
        assert 0.4 < time.monotonic() - start < 5


def test_who_says_nothing_is_left(text, quick):
    with served(text) as running, connect(running) as connection:
        assert heard(connection) == b""


def seconds_of_bytes(connection) -> float:
    """Sends a byte every 50 ms; returns the seconds until the server closed, at most 5."""
    start = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - start < 5:
            connection.sendall(b"x")
            time.sleep(0.05)
    return time.monotonic() - start


def test_a_byte_now_and_then_wins_no_time(text, quick):
    with served(text) as running, connect(running, HALF) as connection:
        assert seconds_of_bytes(connection) < 2


def test_the_rest_of_a_request_that_is_answered_wins_no_time(text, quick):
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with served(text) as running, connect(running, head) as connection:
        assert seconds_of_bytes(connection) < 2


def test_the_time_counts_for_heads_alone(text, quick):
    """The limit does not apply to an answer or to the pause before the next request."""
    with served(text) as running, raw(running, True) as connection:
        start = time.monotonic()
        while time.monotonic() - start < 1:
            assert connection.recv(1 << 16)


def test_a_connection_that_goes_on_has_its_time_for_each_head(text, quick):
    with served(text) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        connection.connect()
        used = connection.sock
        for _ in range(4):
            time.sleep(0.3)
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            assert connection.sock is used
        connection.close()


def test_requests_that_come_at_once_are_answered_one_by_one(text, quick):
    last = ASKS.replace(b"Host", b"Connection: close\r\nHost")
    with served(text) as running, connect(running, ASKS * 3 + last) as connection:
        assert heard(connection).count(b'"text":"aa"') == 4


def test_nonsense_gets_openais_error_and_no_line_in_the_log(text, capfd):
    with served(text) as running:
        for said in (b"\x16\x03\x01" * 9 + b"\r\n\r\n", HEALTH[:-2] + b"Upgrade\r\n\r\n"):
            with connect(running, said) as connection:
                assert answer(connection) == (400, "Invalid HTTP request received.")
        upgrade = HEALTH[:-2] + b"Connection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
        with connect(running, upgrade) as connection:
            assert heard(connection).startswith(b"HTTP/1.1 200")
        chunked = ASKS.split(b"Content-Length")[0]
        chunked += b"Transfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n"
        with connect(running, chunked) as connection:
            assert answer(connection)[0] == 400
        with raw(running, True) as connection:  # an answer has begun, so no error follows
            connection.sendall(b"\x16\x03\x01" * 9 + b"\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert capfd.readouterr().err == ""


def test_who_does_not_read_is_left(text, monkeypatch):
    monkeypatch.setattr(connections, "READING_SECONDS", 0.5)
    with served(text) as running:
        say_much(running)
        with raw(running, True):
            start = time.monotonic()
            running.until(lambda: not running.engine.open)
            assert time.monotonic() - start > 0.4


def test_at_the_limit_the_one_that_waits_longest_makes_room(text):
    with served(text, connections=5) as running, contextlib.ExitStack() as stack:
        busy = stack.enter_context(raw(running, True))  # the oldest one, but its answer runs
        half = []
        for _ in range(20):
            half.append(stack.enter_context(connect(running, HALF)))
            time.sleep(0.02)
        assert health(running) == b"HTTP/1.1 200"
        for connection in half:
            connection.setblocking(False)
        assert sum(map(is_open, half)) <= 4
        assert not any(map(is_open, half[:16]))
        assert busy.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert busy.recv(1 << 16)


def is_open(connection):
    try:
        return connection.recv(1000) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def test_a_body_that_does_not_come_keeps_nobody_out(text):
    with served(text, connections=2) as running, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connect(running, ASKS[:-1]))
        time.sleep(0.1)
        with connect(running, ASKS) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_where_all_are_answered_the_next_gets_503(text):
    with served(text, connections=2, waiting=5) as running, contextlib.ExitStack() as stack:
        first = [stack.enter_context(raw(running, True)) for _ in range(2)]
        running.until(lambda: running.scheduler._queue)
        with connect(running, ASKS) as connection:
            assert answer(connection) == (503, "all 2 connections are in use; try later")
        assert health(running) == b"HTTP/1.1 200"
        first[0].close()
        running.until(lambda: not running.scheduler._queue)
        first[1].close()
        with connect(running, ASKS) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("files", "asked", "most"),
    [(100, None, 50), (1024, None, 512), (1 << 20, None, 1024), (1, None, 1), (100, 50, 50)]
    + [(resource.RLIM_INFINITY, asked, asked or 1024) for asked in (None, 5000)],
)
def test_connections_have_half_of_the_files(monkeypatch, files, asked, most):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files, files))
    assert most_connections(asked) == most


def test_more_connections_than_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 4096))
    with pytest.raises(UserError, match=r"--max-connections 51: .* 100 files; give at most 50, or"):
        most_connections(51)


def test_a_system_out_of_files_is_told_once(monkeypatch, caplog):
    """The server waits after each failure and logs only the first one."""
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.01)
    tries = []

    async def refuse(listener):
        tries.append(listener)
        raise OSError(errno.EMFILE, "Too many open files")

    async def accept():
        monkeypatch.setattr(asyncio.get_running_loop(), "sock_accept", refuse)
        with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await ConnectionLimiter(None, set(), 10).accept(listener)

    with caplog.at_level(logging.INFO):
        asyncio.run(accept())
    assert 5 < len(tries) < 60
    told = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
    assert told == ["cannot accept connections at present: Too many open files; logged once"]
