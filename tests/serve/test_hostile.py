"""Tests `qlora-jax serve` in a separate process, with hostile clients and files."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import time
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.slow

ASKED = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0}
FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
"""
STUCK = """
import sys, time
from qlora_jax.serve import engine, scheduler
def stuck(*arguments):
    print("compiling now", file=sys.stderr, flush=True)
    time.sleep(100)
"""


def ask(server, path, body=None, headers=None, timeout=20):
    """Sends a GET, or a POST if there is a body; returns status and text of the answer."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=timeout)
    data = None if body is None else json.dumps(body)
    kind = {} if body is None else {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, data, kind | (headers or {}))
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response.status, response.read().decode()


def stop(server, number):
    """Stops the server; returns the seconds, the exit code and the log lines after `serving`."""
    start = time.monotonic()
    code, said = server.stop(number)
    return time.monotonic() - start, code, said.partition("serving on")[2].splitlines()[1:]


def test_a_web_page_of_another_name_cannot_load(start, adapters):
    server = start("--allowed-host=api.example")
    load = {"lora_name": "three", "lora_path": str(adapters["three"])}
    evil = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}
    status, said = ask(server, "/v1/load_lora_adapter", load, evil)
    assert (status, json.loads(said)["error"]["code"]) == (403, "host_not_allowed")
    assert '"three"' not in ask(server, "/v1/models")[1]
    assert ask(server, "/v1/models", headers={"Host": "api.example:443"})[0] == 200
    assert ask(server, "/v1/load_lora_adapter", load)[0] == 200


def test_keys_on_all_addresses(start, tmp_path):
    """With 0.0.0.0 every Host is answered, because the server cannot know its own names."""
    file = tmp_path / "keys"
    file.write_text("# mine\nsecret\n")
    server = start(f"--api-key-file={file}", "--host=0.0.0.0")
    assert "warning: whoever" not in server.log.read_text()
    assert ask(server, "/health")[0] == 200
    status, said = ask(server, "/v1/completions", ASKED, {"Authorization": "Bearer wrong"})
    assert (status, json.loads(said)["error"]["code"]) == (401, "invalid_api_key")
    right = {"Authorization": "Bearer secret", "Host": "any.example"}
    assert ask(server, "/v1/completions", ASKED, right)[0] == 200
    load = {"lora_name": "a", "lora_path": "b"}
    assert ask(server, "/v1/load_lora_adapter", load, right)[0] == 403


def test_fifos_hold_up_nothing(start, tmp_path):
    os.mkfifo(tmp_path / "adapter_config.json")
    server = start("--grace=3")
    load = {"lora_name": "f", "lora_path": str(tmp_path)}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        loads = [pool.submit(ask, server, "/v1/load_lora_adapter", load) for _ in range(12)]
        assert ask(server, "/v1/completions", ASKED)[0] == 200
        for status, said in (load.result() for load in loads):
            assert status == 400
            assert "adapter_config.json: a FIFO and no regular file" in said
    seconds, code, said = stop(server, signal.SIGTERM)
    assert (code, said) == (143, ["qlora-jax: stopped by SIGTERM"])
    assert seconds < 3


def test_a_load_that_hangs_does_not_hold_up_the_end(start):
    before = STUCK + "from qlora_jax.serve import app\napp.read_regular = stuck\n"
    server = start("--grace=3", "--load-timeout=1", before=before)
    load = {"lora_name": "f", "lora_path": "x"}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(ask, server, "/v1/load_lora_adapter", load) for _ in range(4)]
        assert {load.result()[0] for load in loads} == {504}
    assert ask(server, "/v1/completions", ASKED)[0] == 200
    seconds, code, said = stop(server, signal.SIGTERM)
    assert (code, said[-1]) == (143, "qlora-jax: stopped by SIGTERM")
    assert seconds < 3


def test_half_open_connections_use_up_nothing(start):
    server = start(before=FEW_FILES)
    address = ("127.0.0.1", urlsplit(server.url).port)
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            half = stack.enter_context(socket.create_connection(address, timeout=10))
            half.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-")
        time.sleep(1)
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 100
        assert ask(server, "/health")[0] == 200
        assert ask(server, "/v1/completions", ASKED)[0] == 200
    _, code, said = stop(server, signal.SIGTERM)
    assert (code, said) == (143, ["qlora-jax: stopped by SIGTERM"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_first_compilation(start, number):
    before = STUCK + "engine.Engine.warm_up = stuck\n"
    server = start("--grace=3", before=before, until="compiling (now)")
    begin = time.monotonic()
    code, said = server.stop(number)
    assert code == 128 + number
    end = [f"qlora-jax: stopped by {number.name}"]
    assert said.partition("compiling now")[2].splitlines()[1:] == end
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_compilation_for_a_request(start, number):
    before = STUCK + "scheduler.Scheduler._enter = stuck\n"
    server = start("--grace=3", before=before)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(ask, server, "/v1/completions", ASKED | {"stream": stream})
            for stream in (False, True)
        ]
        while "compiling now" not in server.log.read_text():
            time.sleep(0.01)
        seconds, code, said = stop(server, number)
        for status, answer in (each.result() for each in asked):
            assert (status, json.loads(answer)["error"]["code"]) == (503, "stopping")
    assert (code, said[-1]) == (128 + number, f"qlora-jax: stopped by {number.name}")
    assert said[:-1] == ["compiling now"]
    assert seconds < 3


def test_a_second_signal_acts_at_once(start):
    before = STUCK + "scheduler.Scheduler._enter = stuck\n"
    server = start("--grace=60", before=before)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server, "/v1/completions", ASKED)
        while "compiling now" not in server.log.read_text():
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        seconds, code, said = stop(server, signal.SIGINT)
        assert asked.result()[0] == 503
    assert (code, said) == (130, ["compiling now", "qlora-jax: interrupted"])
    assert seconds < 3
