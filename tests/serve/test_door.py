"""Tests which requests the server answers: the Host header and the API key decide."""

import argparse
import http.client
import json
import socket

import openai
import pytest
from slow_service import served

from qlora_jax.commands.serve import host_name, on_loopback
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.door import LOOPBACK, known_hosts, known_keys, read_keys
from qlora_jax.serve.server import listen


def scope(path="/v1/models", **headers):
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "path": path, "headers": pairs}


def get(running, path, **headers):
    """Returns status, headers and JSON of an answer; http.client adds Host unless it is given."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    tree = json.load(response)
    connection.close()
    return response.status, response.headers, tree


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("127.0.0.1", True),
        ("127.0.0.1:1", True),
        ("[::1]", True),
        ("[::1]:8000", True),
        ("api.example:8443", True),
        ("[fe80::2]:1", True),
        ("", False),
        ("evil.example:8000", False),
        ("api.example.evil.example", False),
        ("evil-api.example", False),
        ("localhost.evil.example", False),
        ("evil.example:8000@localhost", False),
        ("localhost:8000:8000", False),
        ("::1", False),
        ("[::1", False),
        ("[::1].evil.example", False),
        ("0.0.0.0", False),
        ("128.0.0.1", False),
    ],
)
def test_hosts(host, answered):
    problem = known_hosts([*LOOPBACK, "API.example", "fe80::2"])(scope(host=host))
    assert (problem is None) == answered
    if problem:
        assert problem.status == 403
        assert repr(host) in str(problem)


def test_a_request_without_a_host_is_not_answered():
    assert known_hosts(LOOPBACK)(scope()).status == 403


@pytest.mark.parametrize(
    ("authorization", "answered"),
    [
        ("Bearer first-key", True),
        ("bearer  schlüssel", True),
        ("Bearer first-ke", False),
        ("Bearer first-key2", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Basic first-key", False),
        ("first-key", False),
        ("", False),
    ],
)
def test_keys(authorization, answered):
    check = known_keys(["first-key", "schlüssel"])
    as_sent = authorization.encode().decode("latin-1")
    problem = check(scope(authorization=as_sent))
    assert (problem is None) == answered
    if problem:
        assert (problem.status, problem.code) == (401, "invalid_api_key")
        assert "first-key" not in str(problem)


def test_a_key_is_asked_for_everywhere_but_health():
    check = known_keys(["key"])
    assert check(scope("/health")) is None
    for path in ("/", "/v1/models", "/v1/load_lora_adapter", "/health/", "/v1/../health"):
        assert check(scope(path)).status == 401


def test_openais_client_brings_its_key(text):
    with served(text, checks=[known_keys(["secret"])]) as running:
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as no:
            running.ask(stream=False, max_tokens=2)
        assert no.value.code == "invalid_api_key"
        assert no.value.response.headers["WWW-Authenticate"] == "Bearer"
        running.client.api_key = "secret"
        assert running.ask(stream=False, max_tokens=2).choices[0].text == "aa"
        assert get(running, "/health")[0] == 200


def test_another_sites_name_is_refused_on_every_path(text):
    with served(text, checks=[known_hosts(LOOPBACK)], loading=True) as running:
        for path in ("/v1/models", "/health", "/nothing"):
            status, headers, tree = get(running, path, Host="evil.example:8000")
            assert (status, headers.get_content_type()) == (403, "application/json")
            assert tree["error"]["code"] == "host_not_allowed"
            assert tree["error"]["type"] == "invalid_request_error"
        assert get(running, "/health")[0] == 200
        assert get(running, "/v1/models", Host="localhost:1")[0] == 200


def test_a_host_is_told_before_a_key_is_looked_at(text):
    checks = [known_hosts(LOOPBACK), known_keys(["key"])]
    with served(text, checks=checks) as running:
        assert get(running, "/v1/models", Host="evil.example", Authorization="Bearer key")[0] == 403
        assert get(running, "/v1/models")[0] == 401


def test_keys_are_read_one_in_a_line(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes("\ufeff# who\n\none\n  two \r\n#three\nfo#ur\n".encode())
    assert read_keys(str(file)) == ["one", "two", "fo#ur"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; correct the path"),
        (b"", "holds no key; write one key per line"),
        (b"\n  \n# key\n", "holds no key; write one key per line"),
        (b"\xff\xfe\n", "not text in UTF-8; give another file"),
        (b"one\n\ntwo three\n", "line 3: a key has no spaces; one per line"),
    ],
)
def test_a_file_without_keys(tmp_path, content, message):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_keys(str(file))
    assert str(error.value) == f"--api-key-file {file}: {message}"


@pytest.mark.parametrize("text", ["api.example", "my_host", "192.0.2.1", "fe80::2"])
def test_names_of_hosts(text):
    assert host_name(text) == text
    assert host_name("[fe80::2]") == "fe80::2"


@pytest.mark.parametrize("text", ["", "api.example:80", "http://api.example", "a b", "*", "a/b"])
def test_what_is_no_name_of_a_host(text):
    with pytest.raises(argparse.ArgumentTypeError, match="name without a port"):
        host_name(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::1", True),
        ("::", False),
        ("::ffff:127.0.0.1", True),
    ],
)
def test_loopback_is_what_is_listened_on(host, loopback):
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 here")
    with listen(host, 0) as listener:
        assert on_loopback(listener) == loopback


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
