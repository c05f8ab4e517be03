"""Tests the end of a server whose worker is in a long step, such as a first compilation."""

import concurrent.futures
import contextlib
import os
import signal
import threading
import time

import openai
import pytest
from slow_service import Running, connect, heard, post, raw, say_much

from qlora_jax.runtime.errors import Terminated
from qlora_jax.serve.server import serve
from qlora_jax.serve.signals import until_signal

CUT = "the server is stopping and cut this answer"
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def running(text):
    running = Running(text, waiting=5)
    running.engine.compiled.clear()
    yield running
    running.engine.compiled.set()


def ended(running, client, number, pause=0.0):
    """Ends the server with a signal while a client waits; the server's grace time is 2 s.

    Returns:
      The client's result, and the seconds from the signal to the server's end.
    """

    def told():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            said = pool.submit(client)
            running.until(lambda: running.engine.open)
            time.sleep(pause)
            os.kill(os.getpid(), number)
            return time.monotonic(), said.result()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        said = pool.submit(told)
        with pytest.raises(Terminated) as end:
            serve(running.service, running.listener, grace=2)
        now = time.monotonic()
        assert end.value.code == 128 + number
        start, got = said.result()
        return got, now - start


@BOTH
@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_who_waits_for_a_compilation_is_told(running, capfd, number, stream):
    def client():
        with pytest.raises(openai.APIError) as error:
            list(running.ask(stream=stream))
        return error.value

    error, seconds = ended(running, client, number)
    assert error.status_code == 503
    assert (error.code, error.type) == ("stopping", "server_error")
    assert CUT in str(error)
    assert 1.5 < seconds < 2.2
    assert running.service.worker.alive  # the server did not wait for the worker
    assert capfd.readouterr().err == ""


def test_a_stream_ends_with_an_error_event(running, capfd):
    running.engine.compiled.set()
    body = {"model": "base", "prompt": "a", "max_tokens": 900_000, "stream": True}

    def client():
        with connect(running, post("/v1/completions", body)) as connection:
            said = connection.recv(1 << 16)
            running.engine.advance = lambda steps: time.sleep(8)  # like a compilation
            return said + heard(connection)

    said, seconds = ended(running, client, signal.SIGTERM)
    assert seconds < 2.2
    events = said.split(b"\r\n")
    last = next(event for event in reversed(events) if event.startswith(b"data: "))
    assert b'"code": "stopping"' in last
    assert CUT.encode() in last
    assert said.endswith(b"0\r\n\r\n")  # the last chunk: the answer is whole
    assert capfd.readouterr().err == ""


def test_clients_that_do_not_read_do_not_hold_up_the_end(running, capfd):
    """The same holds for clients that sent half a request."""
    running.engine.compiled.set()
    say_much(running)

    def client():
        with contextlib.ExitStack() as stack:
            stack.enter_context(raw(running, True))
            half = post("/v1/completions", {"model": "base", "prompt": "a"})[:-1]
            stack.enter_context(connect(running, half))
            stack.enter_context(connect(running, half[:20]))
            gone.wait(20)

    gone, thread = threading.Event(), threading.Thread(target=client)
    _, seconds = ended(running, thread.start, signal.SIGTERM, pause=1.5)
    gone.set()
    assert seconds < 2.2
    assert capfd.readouterr().err == ""
    thread.join()


@BOTH
def test_a_signal_during_the_start_is_not_waited_for(number):
    answer = threading.Event()

    def compile():
        threading.Timer(0.2, os.kill, [os.getpid(), number]).start()
        answer.wait(60)

    start = time.monotonic()
    with pytest.raises(Terminated) as end:
        until_signal(compile)
    assert end.value.code == 128 + number
    assert time.monotonic() - start < 2
    answer.set()


def test_a_start_without_a_signal_gives_its_result_or_its_error():
    assert until_signal(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        until_signal(lambda: 1 // 0)
