"""Tests the endpoints over rows that never end by themselves: hang-ups, limits, failures."""

import concurrent.futures
import os
import signal
import time

import openai
import pytest
from slow_service import Running, raw, served

from qlora_jax.runtime.errors import RunFailed, Terminated
from qlora_jax.serve.server import serve


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_row(text, stream):
    with served(text) as running:
        connection = raw(running, stream)
        if stream:
            assert connection.recv(1000)
        connection.close()
        running.until(lambda: not running.engine.open and not running.scheduler.busy)
        assert running.ask(max_tokens=3, stream=False).choices[0].text == "aaa"


def test_who_waits_and_hangs_up_is_forgotten(text):
    with served(text) as running:
        first = raw(running, True)
        body = {"model": "base", "prompt": "a", "stream": True}
        with pytest.raises(openai.APITimeoutError):
            running.client.with_options(timeout=0.3).completions.create(**body)
        running.until(lambda: not running.scheduler._queue)
        first.close()


def test_too_many_are_told_to_come_later(text):
    with served(text, waiting=1) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = raw(running, True)
        second = pool.submit(running.ask, max_tokens=3, stream=False)
        running.until(lambda: running.scheduler._queue)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as busy:
            running.ask()
        assert busy.value.code == "rate_limit_exceeded"
        first.close()
        assert second.result().choices[0].text == "aaa"


def test_what_takes_too_long_is_given_up(text):
    with served(text, timeout=0.3) as running:
        with pytest.raises(openai.InternalServerError, match=r"not finished within 0\.3 s") as late:
            running.ask(stream=False)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"not finished within 0\.3 s"):
            list(running.ask())
        running.until(lambda: not running.engine.open)


def test_a_failure_is_told_to_all_and_shows_in_health(text):
    with served(text) as running:
        stream = running.ask()
        next(stream)
        running.engine.broken = True
        with pytest.raises(openai.APIError, match="the server failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="stopping"):
            running.ask()
        running.until(lambda: not running.service.worker.alive)
        with pytest.raises(openai.InternalServerError, match="has stopped answering"):
            running.client.get("/../health", cast_to=object)


def test_adapters_are_not_loaded_where_it_is_not_allowed(text):
    with served(text) as running, pytest.raises(openai.PermissionDeniedError, match="--allow-load"):
        running.client.post("/load_lora_adapter", cast_to=object, body={})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cuts_what_does_not_finish_in_time(text, number):
    running = Running(text)

    def client():
        stream = running.ask()
        said = [next(stream)]
        os.kill(os.getpid(), number)
        with pytest.raises(openai.APIError, match="stopping and cut this answer"):
            said.extend(stream)
        return len(said)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        said = pool.submit(client)
        start = time.monotonic()
        with pytest.raises(Terminated) as ended:
            serve(running.service, running.listener, grace=0.5)
        assert said.result() > 10
    assert ended.value.code == 128 + number
    assert 0.4 < time.monotonic() - start < 60
    assert not running.engine.open


def test_a_failing_engine_ends_the_server(text):
    running = Running(text)
    running.engine.broken = True
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.ask, stream=False)
        with pytest.raises(RunFailed, match="decoding failed: no memory"):
            serve(running.service, running.listener, grace=1)
        assert "the server failed" in str(asked.exception())
