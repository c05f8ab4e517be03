"""A service in the test's process; its engine has one row, which never ends by itself."""

import contextlib
import json
import socket
import threading
import time

import numpy as np
import openai

from qlora_jax.serve.app import Service
from qlora_jax.serve.scheduler import Scheduler
from qlora_jax.serve.server import http_server, listen
from qlora_jax.serve.worker import Worker

LENGTH = 1_000_000


class Slow:
    """A fake engine with one row that repeats one letter, a burst every 10 ms."""

    rows, length, vocabulary, stop_ids = 1, LENGTH, 246, frozenset()

    def __init__(self):
        self.open = set()
        self.seconds = 0.01
        self.broken = False
        self.compiled = threading.Event()  # `enter` waits for this event
        self.compiled.set()

    def enter(self, row, prompt, adapter, settings):
        self.open.add(row)
        assert self.compiled.wait(60)
        return ord("a")

    def advance(self, steps):
        if self.broken:
            raise MemoryError("no memory")
        time.sleep(self.seconds)
        return np.full((1, steps), ord("a"), np.int32)

    def leave(self, row):
        self.open.discard(row)

    def put_adapter(self, slot, updates):
        raise AssertionError


class Running:
    """A service over a slow engine, with its listener and an OpenAI client."""

    def __init__(self, text, waiting=1, timeout=600.0, loading=False, **options):
        self.engine = Slow()
        self.scheduler = Scheduler(self.engine, text.decode, base="base", slots=1, waiting=waiting)
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.service = Service(
            worker=Worker(self.scheduler),
            tokenizer=text,
            model=None,
            vocabulary=246,
            length=LENGTH,
            timeout=timeout,
            loading=loading,
            **options,
        )
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60
        )

    def ask(self, **options):
        options = {"max_tokens": 900_000, "stream": True} | options
        return self.client.completions.create(model="base", prompt="abc", **options)

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "not within 60 s"
            time.sleep(0.01)


@contextlib.contextmanager
def served(text, connections=100, **options):
    running = Running(text, **options)
    server = http_server(running.service, grace=0, connections=connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [running.listener]})
    running.service.worker.start()
    thread.start()
    try:
        yield running
    finally:
        server.should_exit = True
        thread.join()
        if running.service.worker.alive:
            running.service.worker.close()


def post(path, body):
    """Returns the bytes of a POST request."""
    body = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()


def connect(running, said=b""):
    """Opens a connection, sends the bytes `said` and returns the socket."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", running.port))
    connection.sendall(said)
    return connection


def heard(connection):
    """Returns all bytes from a connection until its end."""
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return b"reset"


def raw(running, stream):
    """Returns a connection whose long answer has begun."""
    body = {"model": "base", "prompt": "a", "max_tokens": 900_000, "stream": stream}
    connection = connect(running, post("/v1/completions", body))
    running.until(lambda: running.engine.open)
    return connection


def say_much(running):
    """Makes answers fast and buffers small, so that unread answers soon fill the buffers."""
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    running.engine.seconds = 0.001
