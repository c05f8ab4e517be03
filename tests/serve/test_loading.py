"""Tests adapters loaded by request, from files without any bytes or without an end."""

import concurrent.futures
import contextlib
import os
import shutil
import signal
import socket
import threading
import time

import openai
import pytest
from slow_service import Running, served

from qlora_jax.runtime.errors import Terminated, UserError
from qlora_jax.serve import app
from qlora_jax.serve.loading import read_regular
from qlora_jax.serve.server import serve


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    # The relative name, because the path of a socket has at most 107 bytes.
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


def endless(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(fifo, "a FIFO"), (unix_socket, "a socket"), (endless, "a device"), (folder, "a folder")],
)
def test_only_regular_files_are_opened(tmp_path, adapters, name, make, kind):
    shutil.copytree(adapters["one"], tmp_path / "a")
    file = tmp_path / "a" / name
    file.unlink()
    make(file)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        read = pool.submit(read_regular, str(tmp_path / "a"))
        done = concurrent.futures.wait([read], timeout=10).done
        if not done and kind == "a FIFO":
            file.open("wb").close()  # lets the thread and the test end
        assert done
        with pytest.raises(UserError) as error:
            read.result()
    assert str(error.value) == (
        f"{file}: {kind} and no regular file; give the folder of an adapter"
    )


def test_links_to_regular_files_are_read(tmp_path, adapters):
    for file in adapters["one"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert read_regular(str(tmp_path)).keys() == read_regular(str(adapters["one"])).keys()


@pytest.fixture
def stuck(monkeypatch):
    """Makes reading an adapter hang as on a dead disk; returns the event that ends the hang."""
    answers = threading.Event()

    def read(path, model):
        answers.wait(120)
        raise UserError("read after all")

    monkeypatch.setattr(app, "read_regular", read)
    yield answers
    answers.set()


def load(running):
    body = {"lora_name": "a", "lora_path": "b"}
    return running.client.post("/load_lora_adapter", cast_to=object, body=body)


def test_loads_that_hang_hold_up_nobody_else(text, stuck):
    with (
        served(text, loading=True, load_timeout=1.0) as running,
        concurrent.futures.ThreadPoolExecutor(12) as pool,
    ):
        start = time.monotonic()
        loads = [pool.submit(load, running) for _ in range(12)]
        for _ in range(10):
            assert running.ask(max_tokens=3, stream=False).choices[0].text == "aaa"
        errors = [load.exception() for load in loads]
        assert {error.status_code for error in errors} == {504}
        assert "b: not read within 1 s" in str(errors[0])
        assert time.monotonic() - start < 10
        stuck.set()  # requests that timed out are not read now
        with pytest.raises(openai.BadRequestError, match="read after all"):
            load(running)


def test_a_load_that_hangs_does_not_hold_up_the_end(text, stuck):
    running = Running(text, loading=True)

    def client():
        loading = pool.submit(load, running)
        running.until(lambda: any(t.name == "adapters" for t in threading.enumerate()))
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        return loading.exception()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        said = pool.submit(client)
        start = time.monotonic()
        with pytest.raises(Terminated):
            serve(running.service, running.listener, grace=2)
        assert time.monotonic() - start < 2.5
        assert said.result().status_code == 503
        assert "stopping and cut this answer" in str(said.result())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody-of-this-name", "no such user here"),
        ("a\0b", "lora_path must hold no null character"),
    ],
)
def test_paths_that_name_nothing(text, path, message):
    with served(text, loading=True) as running:
        body = {"lora_name": "a", "lora_path": path}
        with pytest.raises(openai.BadRequestError, match=message):
            running.client.post("/load_lora_adapter", cast_to=object, body=body)
