"""Checks the errors for requests that cannot be answered: full sentences with a remedy."""

import json

import pytest

from qlora_jax.serve.api import ChatRequest, CompletionRequest, LoadAdapter, Problem, parse

TURNS = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "m", "messages": TURNS}
TEXT = {"model": "m", "prompt": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALLS = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
RESULT = [*TURNS, {"role": "tool", "content": "3", "tool_call_id": "1"}]
JSON = {"type": "json_object"}
PICTURE = [{"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("kind", "body", "param", "message"),
    [
        (
            ChatRequest,
            CHAT | {"tools": [TOOL]},
            "tools",
            "cannot be used: no tools are called here; ",
        ),
        (
            ChatRequest,
            CHAT | {"tool_choice": "auto"},
            "tool_choice",
            "cannot be used: no tools are",
        ),
        (
            ChatRequest,
            CHAT | {"functions": [TOOL]},
            "functions",
            "cannot be used: no tools are called",
        ),
        (
            ChatRequest,
            CHAT | {"messages": CALLS},
            "messages.0.tool_calls",
            "write the call into content",
        ),
        (
            ChatRequest,
            CHAT | {"messages": RESULT},
            "messages.1.tool_call_id",
            "write the tool's result",
        ),
        (
            ChatRequest,
            CHAT | {"messages": [{"role": "tool", "content": "3"}]},
            "messages.0.role",
            "cannot be used: a role is system, developer, user or assistant; give one of these",
        ),
        (
            ChatRequest,
            CHAT | {"response_format": JSON},
            "response_format.type",
            'cannot be used: answers are text here; leave it out, or give {"type": "text"}',
        ),
        (
            ChatRequest,
            CHAT | {"n": 2},
            "n",
            "cannot be used: a request has one answer here; leave it out",
        ),
        (
            ChatRequest,
            CHAT | {"top_logprobs": 3},
            "top_logprobs",
            "no probabilities are returned here; ",
        ),
        (
            ChatRequest,
            CHAT | {"logit_bias": {"1": 2.0}},
            "logit_bias",
            "temperature and top_p; leave it",
        ),
        (ChatRequest, CHAT | {"frequency_penalty": 1}, "frequency_penalty", "top_p; leave it out"),
        (
            ChatRequest,
            CHAT | {"modalities": ["audio"]},
            "modalities",
            "answers are text here; leave it",
        ),
        (ChatRequest, CHAT | {"top_k": 3}, "top_k", "is not supported here; leave it out"),
        (ChatRequest, {"model": "m"}, "messages", "is missing; give it"),
        (
            ChatRequest,
            CHAT | {"messages": [{"role": "user", "content": PICTURE}]},
            "messages.0.content",
            "must be text, or parts of type text; correct content",
        ),
        (
            ChatRequest,
            CHAT | {"temperature": 3},
            "temperature",
            "must be less than or equal to 2; correct temperature",
        ),
        (
            ChatRequest,
            CHAT | {"stop": list("abcde")},
            "stop",
            "must have at most 4 items, not 5; correct",
        ),
        (
            ChatRequest,
            CHAT | {"stop": [""]},
            "stop.0",
            "must have at least 1 character; correct stop",
        ),
        (ChatRequest, CHAT | {"stream": 1}, "stream", "must be a valid boolean; correct stream"),
        (
            CompletionRequest,
            TEXT | {"prompt": []},
            "prompt",
            "must be one text or one list of token ids, not empty; correct prompt",
        ),
        (
            CompletionRequest,
            TEXT | {"echo": True},
            "echo",
            "answers come without their prompt here; ",
        ),
        (CompletionRequest, TEXT | {"suffix": "x"}, "suffix", "before a suffix here; leave it out"),
        (
            CompletionRequest,
            TEXT | {"best_of": 3},
            "best_of",
            "a request has one answer here; leave",
        ),
        (
            LoadAdapter,
            {"lora_name": "a", "lora_path": "a\0"},
            "lora_path",
            "must hold no null character; correct lora_path",
        ),
    ],
)
def test_a_field_is_refused_by_name_and_with_a_remedy(kind, body, param, message):
    with pytest.raises(Problem) as refused:
        parse(kind, json.dumps(body).encode())
    said = str(refused.value)
    assert refused.value.status == 400
    assert refused.value.param == param
    assert said.startswith(f"{param} ")
    assert message in said
    assert "Input should" not in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON ("),
        (b"[1]", "the body is not a JSON object; send one"),
    ],
)
def test_what_is_no_object_is_refused(body, message):
    with pytest.raises(Problem) as refused:
        parse(ChatRequest, body)
    assert message in str(refused.value)
    assert "; send one" in str(refused.value)
    assert refused.value.body()["error"]["type"] == "invalid_request_error"
