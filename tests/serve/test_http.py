"""Tests `qlora-jax serve` in a separate process, with OpenAI's client and with plain HTTP."""

import concurrent.futures
import http.client
import json
import signal
from urllib.parse import urlsplit

import openai
import pytest

pytestmark = pytest.mark.slow

PROMPT = "What does copytree do?"
CHAT = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def server(start):
    return start()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def post(server, path, body, headers=None):
    """Sends a POST; returns status and body: JSON if the answer is JSON, otherwise text."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    text = response.read()
    connection.close()
    media = response.headers.get_content_type()
    return response.status, json.loads(text) if media == "application/json" else text.decode()


def ask(client, model, **options):
    options = {"max_tokens": 24, "temperature": 0} | options
    return client.chat.completions.create(model=model, messages=CHAT, **options)


def text(answer):
    return answer.choices[0].message.content


def streamed(client, model, **options):
    chunks = list(ask(client, model, stream=True, **options))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return said, chunks


def test_models_are_the_base_and_the_adapters(client):
    models = client.models.list().data
    assert [m.id for m in models] == ["tiny", "one", "two"]
    assert [m.parent for m in models] == [None, "tiny", "tiny"]


def test_each_adapter_answers_as_generate_does(client, adapters, run_cli, tiny_model):
    options = ["--prompt", PROMPT, "--max-new-tokens", "24", "--dtype", "float32", "--json"]
    given = [f"--adapter={name}={adapters[name]}" for name in ("one", "two")]
    ended = run_cli("generate", tiny_model, *given, "--base", *options)
    assert ended.code == 0, ended.err
    rows = {row["adapter"]: row for row in json.loads(ended.out)}
    assert set(rows) == {"one", "two", None}
    answers = {name: text(ask(client, name or "tiny")) for name in rows}
    assert answers == {name: row["answer"] for name, row in rows.items()}
    assert len(set(answers.values())) == 3


def test_streams_say_the_same_in_pieces(client):
    whole = ask(client, "one", temperature=1, seed=5)
    said, chunks = streamed(
        client, "one", temperature=1, seed=5, stream_options={"include_usage": True}
    )
    assert said == text(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == 24 + whole.usage.prompt_tokens
    assert len({c.id for c in chunks}) == 1
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) >= 2


def test_a_stream_ends_with_done(server):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    body = {"model": "one", "prompt": "abc", "max_tokens": 3, "stream": True}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.headers.get_content_type() == "text/event-stream"
    events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert "usage" not in last


def test_completions_take_text_or_ids_and_a_stop(client):
    by_text = client.completions.create(model="two", prompt="abc", max_tokens=20, temperature=0)
    ids = list(b"abc")  # the tokenizer has one token for each byte
    by_ids = client.completions.create(model="two", prompt=ids, max_tokens=20, temperature=0)
    said = by_text.choices[0].text
    assert by_ids.choices[0].text == said
    assert by_text.usage.prompt_tokens == 3
    stop = next(c for c in said if c.isascii())
    cut = client.completions.create(
        model="two", prompt="abc", max_tokens=20, temperature=0, stop=stop
    )
    assert cut.choices[0].text == said[: said.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 20


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_request_amid_others_gets_the_answer_it_gets_alone(client, temperature):
    names = ["one", "two", "tiny", "one", "two", "tiny", "one"]
    wanted = [
        {"temperature": temperature, "seed": i // 3, "max_tokens": 20 + i, "top_p": 0.95}
        for i in range(len(names))
    ]
    alone = [text(ask(client, n, **o)) for n, o in zip(names, wanted)]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        amid = list(pool.map(lambda n, o: text(ask(client, n, **o)), names, wanted))
    assert amid == alone


def test_without_a_seed_answers_differ(client):
    assert text(ask(client, "one", temperature=1)) != text(ask(client, "one", temperature=1))


BODY = {"model": "one", "messages": CHAT, "max_tokens": 4}
COMPLETION = {"model": "one", "prompt": "abc"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message", "param"),
    [
        ("chat/completions", b'{"model": ', 400, "not valid JSON", None),
        ("chat/completions", b"[" * 100_000, 400, "not valid JSON", None),
        ("chat/completions", b'{"model": "\\ud800"}', 400, "not valid JSON", None),
        ("chat/completions", b'{"model": "\xed\xa0\x80"}', 400, "not valid JSON", None),
        (
            "chat/completions",
            '{"model": "\ud800"}'.encode("utf-16", "surrogatepass"),
            400,
            "not valid JSON",
            None,
        ),
        ("chat/completions", b"[1]", 400, "not a JSON object", None),
        ("chat/completions", {"model": "one"}, 400, "messages is missing", "messages"),
        (
            "chat/completions",
            BODY | {"messages": []},
            400,
            "messages must have at least 1",
            "messages",
        ),
        ("chat/completions", BODY | {"model": "none"}, 404, "give one of: tiny, one, two", "model"),
        ("chat/completions", BODY | {"model": 3}, 400, "model must be a valid string", "model"),
        (
            "chat/completions",
            BODY | {"n": 2},
            400,
            "n cannot be used: a request has one answer",
            "n",
        ),
        (
            "chat/completions",
            BODY | {"temperature": "hot"},
            400,
            "temperature must be a valid",
            "temperature",
        ),
        (
            "chat/completions",
            BODY | {"temperature": True},
            400,
            "temperature must be a valid",
            "temperature",
        ),
        (
            "chat/completions",
            BODY | {"temperature": -1},
            400,
            "temperature must be greater",
            "temperature",
        ),
        ("chat/completions", BODY | {"top_p": 0}, 400, "top_p must be greater than 0", "top_p"),
        (
            "chat/completions",
            BODY | {"max_tokens": 0},
            400,
            "max_tokens must be greater",
            "max_tokens",
        ),
        (
            "chat/completions",
            BODY | {"max_tokens": 1.5},
            400,
            "max_tokens must be a valid",
            "max_tokens",
        ),
        ("chat/completions", BODY | {"max_tokens": 256}, 400, "more than the 256 positions", None),
        ("chat/completions", BODY | {"stop": [""]}, 400, "stop.0 must have at least 1", "stop.0"),
        (
            "chat/completions",
            BODY | {"stop": list("abcde")},
            400,
            "stop must have at most 4 items",
            "stop",
        ),
        (
            "chat/completions",
            BODY | {"tools": [{}]},
            400,
            "tools cannot be used: no tools are called",
            "tools",
        ),
        (
            "chat/completions",
            BODY | {"logprobs": True},
            400,
            "logprobs cannot be used: ",
            "logprobs",
        ),
        (
            "completions",
            COMPLETION | {"prompt": ["a", "b"]},
            400,
            "prompt must be one text",
            "prompt",
        ),
        ("completions", COMPLETION | {"prompt": ""}, 400, "prompt has no tokens", "prompt"),
        ("completions", COMPLETION | {"prompt": [1, 9999]}, 400, "outside the vocab", "prompt"),
        ("completions", COMPLETION | {"prompt": "a" * 300}, 400, "300 tokens of prompt", None),
        ("completions", COMPLETION | {"prompt": "a" * (5 << 20)}, 413, "larger than", None),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "no"}, 400, "no such folder", None),
        ("load_lora_adapter", {"lora_name": "x"}, 400, "lora_path is missing", "lora_path"),
        ("unload_lora_adapter", {"lora_name": "x"}, 404, "no adapter 'x' is loaded", "model"),
        ("nothing", {}, 404, "there is no endpoint '/v1/nothing'; there are: /v1", None),
        ("completions/", BODY, 404, "there is no endpoint '/v1/completions/'", None),
        ("models", {}, 405, "/v1/models does not take POST; use ", None),
    ],
    ids=lambda value: ascii(value[:24]) if isinstance(value, bytes) else None,
)
def test_bad_requests_get_openais_errors(server, path, body, status, message, param):
    found, tree = post(server, f"/v1/{path}", body)
    assert found == status
    error = tree["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="'none' is not loaded") as error:
        ask(client, "none")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "one", max_tokens=10_000)
    assert error.value.code == "context_length_exceeded"


def test_a_web_page_cannot_post(server):
    status, tree = post(server, "/v1/completions", COMPLETION, {"Content-Type": "text/plain"})
    assert status == 415
    assert "application/json" in tree["error"]["message"]


def test_nulls_and_fields_without_effect_are_no_error(server):
    extra = {"user": "me", "metadata": {"a": "b"}, "tools": None, "n": 1, "presence_penalty": 0}
    status, tree = post(server, "/v1/chat/completions", BODY | extra)
    assert status == 200, tree


def test_content_may_come_in_parts(client):
    parts = [{"type": "text", "text": PROMPT[:7]}, {"type": "text", "text": PROMPT[7:]}]
    messages = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(
        model="one", messages=messages, max_completion_tokens=24, temperature=0
    )
    assert text(answer) == text(ask(client, "one"))


def test_adapters_come_and_go_while_others_answer(server, client, adapters):
    before = text(ask(client, "one"))
    load = {"lora_name": "three", "lora_path": str(adapters["three"])}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: text(ask(client, "one", max_tokens=200)))
        status, said = post(server, "/v1/load_lora_adapter", load)
        assert (status, said) == (200, "Success: LoRA adapter 'three' added successfully.")
        three = text(ask(client, "three"))
        assert running.result().startswith(before)
    assert three not in (before, text(ask(client, "two")))
    status, tree = post(server, "/v1/load_lora_adapter", load)
    assert (status, "loaded already" in tree["error"]["message"]) == (400, True)
    status, tree = post(server, "/v1/load_lora_adapter", load | {"lora_name": "four"})
    assert (status, "all 3 slots" in tree["error"]["message"]) == (400, True)
    status, said = post(server, "/v1/unload_lora_adapter", {"lora_name": "three"})
    assert (status, said) == (200, "Success: LoRA adapter 'three' removed successfully.")
    with pytest.raises(openai.NotFoundError):
        ask(client, "three")


def test_a_port_in_use(server, run_cli, tiny_model):
    port = urlsplit(server.url).port
    ended = run_cli("serve", tiny_model, "--port", str(port))
    assert ended.code == 2
    assert ended.err == (
        f"qlora-jax: --port {port}: in use on 127.0.0.1; give another, or 0 for a free one\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter=x"], "--adapter: must be NAME=DIR, not 'x'"),
        (["--adapter=x=a", "--adapter=x=b"], "--adapter x=...: the name is given twice"),
        (["--port=70000"], "--port: must be a whole number from 0 to 65535"),
        (["--port=0", "--adapter=x=none"], "--adapter x: none: no such folder"),
        (["--port=0", "--max-length=513"], "--max-length 513: the model has 512 positions"),
        (["--port=0", "--host=192.0.2.1"], "--host 192.0.2.1 --port 0: Cannot assign requested"),
        (["--port=0", "--api-key-file=none"], "--api-key-file none: cannot be read: No such file"),
        (["--port=0", "--api-key-file=/dev/null"], "--api-key-file /dev/null: holds no key; write"),
        (["--port=0", "--allowed-host=x:80"], "--allowed-host: must be a host name without a p"),
        (["--port=0", "--max-connections=0"], "--max-connections: must be a whole number of 1 or"),
        (["--port=0", "--max-connections=999999999"], "--max-connections 999999999: this process"),
        (["--port=0", "--load-timeout=0"], "--load-timeout: must be a number above 0, not '0'"),
    ],
)
def test_options_that_cannot_be_used(run_cli, tiny_model, options, message):
    ended = run_cli("serve", tiny_model, *options)
    assert ended.code == 2
    assert message in ended.message
    assert ended.err.count("\n") == 1 or "--max-length" in message  # checked with the model open


def test_health(server):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert (response.status, json.load(response)) == (200, {"status": "ok"})


def test_sigterm_lets_running_answers_finish(server, client):
    """Must stay last in this file, because it ends the server."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = ask(client, "one", stream=True, max_tokens=200)
        chunks = [next(stream)]
        rest = pool.submit(list, stream)
        code, said = server.stop(signal.SIGTERM)
        chunks += rest.result()
    assert chunks[-1].choices[0].finish_reason == "length"
    assert code == 143
    assert said.splitlines()[-1] == "qlora-jax: stopped by SIGTERM"
    assert "Traceback" not in said
