import json

import pytest

from qlora_jax.data import turns
from qlora_jax.data.field_names import FUNCTION_CALL, ROLES
from qlora_jax.runtime.errors import UserError

USER = {"role": "user", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(*given):
    return turns.messages(list(given), "set:1: messages")


def one(turn):
    """Returns the message that one turn becomes."""
    (message,), _ = read(turn)
    return message


@pytest.mark.parametrize("name", sorted(ROLES.keys() - {FUNCTION_CALL}))
@pytest.mark.parametrize("change", [str, str.upper, str.title])
def test_names_of_roles(name, change):
    expected = {"role": ROLES[name], "content": "a"}
    assert one({"role": change(name), "content": "a"}) == expected


@pytest.mark.parametrize(
    ("who", "what"), [("role", "content"), ("from", "value"), ("role", "text"), ("role", "value")]
)
def test_keys_of_a_turn(who, what):
    assert one({who: "human", what: "a"}) == USER
    assert one({who: "human", what: [{"type": "text", "text": "a"}]}) == USER


@pytest.mark.parametrize(
    "pair", [("user", "assistant"), ("human", "assistant"), ("input", "output")]
)
def test_a_pair_is_two_turns(pair):
    answer = {"role": "assistant", "content": "b"}
    assert read(dict(zip(pair, "ab"))) == ([USER, answer], set())


def test_further_keys_go_along_and_null_ones_do_not():
    turn = {"role": "tool", "content": "3C", "tool_call_id": "1", "name": "f", "tool_calls": None}
    assert one(turn) == {"role": "tool", "content": "3C", "tool_call_id": "1", "name": "f"}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}]'},
    ],
)
def test_calls_of_tools(turn):
    assert one(turn) == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_a_call_keeps_its_id_and_the_turn_its_text():
    call = {"id": "7", **CALL}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert one(turn) == turn
    without = {"function": {"name": "f", "arguments": ""}}
    (made,) = one({"role": "assistant", "tool_calls": [without]})["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_by_its_own_name_and_by_the_usual_one(key):
    turn = {"role": "assistant", "content": "b", key: "hm"}
    assert one(turn) == {**turn, "reasoning_content": "hm"}


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", [0, 0.0, False, 1, 1.0, True, None])
def test_marks_of_loss(key, value):
    answer = {"role": "assistant", "content": "b"}
    messages, without_loss = read(USER, {**answer, key: value}, {**USER, key: 0})
    assert messages == [USER, answer, USER]
    assert without_loss == (set() if value in (1, None) else {1})


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({**USER, "weight": 1}, "weight 1 in a turn of user; only the assistant's"),
        ({"role": "assistant", "content": "b", "weight": 2}, "weight must be true, false, 0 or 1"),
        ({"role": "assistant", "content": "b", "train": "no"}, "train must be .* not 'no'"),
        ({"role": "assistant", "content": "b", "train": True, "weight": 0}, "contradict"),
        ({"role": "assistant", "content": "b", "train_detail": [{}]}, "train_detail.* use train"),
        ({**USER, "tool_calls": [CALL]}, "tool_calls in a turn of user"),
        ({"role": "assistant", "tool_calls": []}, "content is missing or null"),
        ({"role": "assistant", "tool_calls": "f(x)"}, "must be a list of calls in JSON"),
        ({"role": "assistant", "tool_calls": [{"x": 1}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}, "JSON object"),
        ({"role": "assistant", "tool_calls": [CALL], "function_call": CALL}, "remove one"),
        ({"from": "function_call", "value": "f(x)"}, "must be a list of calls in JSON"),
        ({"user": "a", "assistant": "b", "id": 3}, "id next to user and assistant"),
        ({"role": 3, "content": "a"}, "unknown role 3; name it user, assistant, system or tool"),
        ({"role": "user", "content": {"text": "a"}}, "content must be a string"),
        ({"role": "user", "content": []}, r"content must be a string, not \[\]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "only text can"),
        ({"role": "user", "content": [{"type": "image", "text": "a"}]}, "type 'image'; only text"),
        ({"role": "user", "content": ["a"]}, r"content\[0\] must be"),
    ],
)
def test_what_cannot_be_read_is_named(turn, message):
    with pytest.raises(UserError, match=message) as e:
        read(USER, turn)
    assert str(e.value).startswith("set:1: messages[1]")
    assert "\n" not in str(e.value)
