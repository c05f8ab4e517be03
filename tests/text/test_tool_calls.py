"""Tool calls in the form that a chat template expects."""

import json

import pytest

from qlora_jax.text.ignored import ignored
from qlora_jax.text.tool_calls import Form, form, written

ARGUMENTS = "{{ call.function.arguments | tojson }}"
TEXT = "{{ call.function.arguments }}"
NULL = "{% if m.content is none %}<call>{% endif %}"
ADDED = "{{ 'said: ' + m.content }}"


def template(arguments, content):
    return (
        "{% for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}"
        f"{content}{{{{ call.function.name }}}}({arguments}){{% endfor %}}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize(
    ("arguments", "content", "expected"),
    [
        (ARGUMENTS, NULL, Form(True, True)),
        (ARGUMENTS, ADDED, Form(False, True)),
        (TEXT, NULL, Form(True, False)),
        (TEXT, ADDED, Form(False, False)),
        (ARGUMENTS, "{{ m.content }}", Form(False, True)),  # writes "None" if the content is None
    ],
)
@pytest.mark.parametrize("given", [{"a": [1, "é"]}, '{"a": [1, "é"]}'])
def test_a_call_is_written_once_as_json(make_tokenizer, arguments, content, expected, given):
    tokenizer = make_tokenizer(template(arguments, content))
    assert form(lambda m: tokenizer.render(m, False)) == expected == tokenizer.tool_call_form
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = tokenizer.render(written([turn], expected), False)
    assert json.loads(text.partition("f(")[2].removesuffix(")")) == {"a": [1, "é"]}
    assert "None" not in text


def test_a_template_without_calls_has_no_form(tokenizer):
    assert tokenizer.tool_call_form is None


def test_arguments_that_are_no_object_stay(make_tokenizer):
    call = {"function": {"name": "f", "arguments": "not json"}}
    (turn,) = written([{"role": "assistant", "tool_calls": [call, "odd"]}], Form(True, True))
    assert turn["tool_calls"] == [call, "odd"]


def test_what_a_template_does_not_write_is_named(make_tokenizer):
    tokenizer = make_tokenizer(
        "{{ tools | length }}{% for m in messages %}{{ m.name }}{{ m.reasoning_content }}"
        "{{ m.content }}{{ m.must.be }}{% endfor %}"
    )
    turn = {
        "role": "user",
        "content": "a",
        "name": "N",
        "reasoning_content": "R",
        "thinking": "R",
        "tool_call_id": "1",
        "must": {"be": "here"},
    }
    variables = {"tools": [{}], "documents": [{"title": "t", "text": "d"}]}

    def write(messages, variables):
        return tokenizer.render(messages, False, variables)

    assert ignored([turn], variables, write) == ["tool_call_id", "documents"]
    assert ignored([{"role": "user", "content": "a"}], {}, write) == []
