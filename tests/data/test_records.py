import pytest

from qlora_jax.data.records import Chat, Prompt, Text, parser
from qlora_jax.runtime.errors import UserError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def parse(row, format="auto"):
    return parser(list(row), format, "set")(row, "set:1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS}, Chat(messages=tuple(TURNS))),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b", "weight": 1},
                ],
                "id": "7",
            },
            Chat(messages=({"role": "system", "content": "s"}, *TURNS)),
        ),
        ({"prompt": "a", "completion": "b"}, Prompt(prompt="a", completion="b")),
        ({"prompt": "a", "response": "b"}, Prompt(prompt="a", completion="b")),
        ({"question": "a", "answer": "b"}, Prompt(prompt="a", completion="b")),
        ({"instruction": "a", "output": "b"}, Prompt(prompt="a", completion="b")),
        ({"instruction": "a", "input": "", "output": "b"}, Prompt(prompt="a", completion="b")),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            Prompt(prompt="a\n\nc", completion="b"),
        ),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            Prompt(prompt="a\n\nc", completion="b"),
        ),
        ({"input": "a", "output": "b"}, Prompt(prompt="a", completion="b")),
        ({"text": "a"}, Text(text="a")),
        ({"instruction": "a", "output": "b", "text": "ab"}, Prompt(prompt="a", completion="b")),
        ({"prompt": "x", "prompt_id": "1", "messages": TURNS}, Chat(messages=tuple(TURNS))),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, TURNS[1]]},
            Chat(messages=tuple(TURNS)),
        ),
    ],
)
def test_fields_decide_the_type(row, expected):
    assert parse(row) == expected


def test_format_overrides_the_order():
    row = {"text": "t", "prompt": "p", "completion": "c", "messages": TURNS}
    assert isinstance(parse(row, "chat"), Chat)
    assert isinstance(parse(row, "prompt"), Prompt)
    assert isinstance(parse(row, "text"), Text)


@pytest.mark.parametrize("format", ["auto", "chat", "prompt", "text"])
def test_fields_that_are_absent_are_named_with_those_found(format):
    with pytest.raises(UserError, match=r"^set: the fields are colour, size; ") as e:
        parser(["colour", "size"], format, "set")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "set:1: text must be a string, not null"),
        ({"text": 3}, "set:1: text must be a string, not 3"),
        ({"text": "\ud83d"}, "half a surrogate pair"),
        ({"prompt": "a", "completion": None}, "set:1: completion must be a string, not null"),
        ({"messages": []}, "set:1: messages must be a list of turns"),
        ({"messages": "hello"}, "set:1: messages must be a list of turns, not 'hello'"),
        ({"messages": ["hello"]}, "messages\\[0\\]: a turn must be an object"),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
            "messages\\[1\\].content",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'.*user"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown from 'alien'"),
        ({"messages": [{"role": "user"}]}, "no content in it; it has role"),
        ({"messages": [{"content": "x"}]}, "no role in it; it has content"),
    ],
)
def test_bad_rows_name_place_field_and_value(row, message):
    with pytest.raises(UserError, match=message) as e:
        parse(row)
    assert str(e.value).startswith("set:1: ")


def test_a_later_row_without_the_field_is_named():
    read = parser(["prompt", "completion"], "auto", "set")
    with pytest.raises(UserError, match="set:9: no completion in it; it has prompt, answer"):
        read({"prompt": "a", "answer": "b"}, "set:9")


def test_where_is_kept_but_is_not_part_of_the_value():
    assert Text(text="a", where="x:1") == Text(text="a", where="y:2")
