import json

import pytest

from qlora_jax.data import rows
from qlora_jax.data.field_names import PROMPT_FIELDS
from qlora_jax.data.records import Chat, Prompt, Text
from qlora_jax.data.values import Fields
from qlora_jax.runtime.errors import UserError

MORE = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


PAIR = Prompt(prompt="a", completion="b")
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def parse(row, format="auto"):
    return rows.parse(Fields(row, "set:1"), format)


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
        ({"user": "a", "assistant": "b"}, Prompt(prompt="a", completion="b")),
        ({"prompt": "a", "generation": "b"}, Prompt(prompt="a", completion="b")),
        *(
            ({ask: "a", "context": "c", answer: "b"}, Prompt(prompt="a\n\nc", completion="b"))
            for ask, answer in PROMPT_FIELDS
        ),
        (
            {"prompt": "a", "input": "c", "context": "d", "completion": "b"},
            Prompt(prompt="a\n\nc\n\nd", completion="b"),
        ),
        ({"prompt": "[1, 2]", "completion": "[3]"}, Prompt(prompt="[1, 2]", completion="[3]")),
        ({"messages": None, "prompt": "a", "completion": ""}, Prompt(prompt="a", completion="")),
        ({"prompt": "", "completion": "", "text": "", "query": "a", "response": "b"}, PAIR),
        ({"messages": "", "text": "a"}, Text(text="a")),
        ({"messages": json.dumps(TURNS)}, Chat(messages=tuple(TURNS))),
        ({"messages": TURNS, "text": "ab"}, Chat(messages=tuple(TURNS))),
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


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TURNS, "system": "s"}, [SYSTEM, *TURNS]),
        ({"conversations": TURNS, "system_prompt": "s"}, [SYSTEM, *TURNS]),
        ({"messages": [SYSTEM, *TURNS], "system": "s"}, [SYSTEM, *TURNS]),
        ({"messages": TURNS, "system": "", "system_prompt": None}, TURNS),
        ({"instruction": "a", "output": "b", "system": "s"}, [SYSTEM, *TURNS]),
        ({"system_prompt": "s", "question": "a", "response": "b"}, [SYSTEM, *TURNS]),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
            [
                SYSTEM,
                *TURNS,
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ],
        ),
        (
            {"instruction": "a", "input": "c", "output": "b", "history": '[["q", "r"]]'},
            [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "r"},
                {"role": "user", "content": "a\n\nc"},
                {"role": "assistant", "content": "b"},
            ],
        ),
    ],
)
def test_a_systems_text_and_earlier_turns_beside_a_record_are_turns_of_it(row, messages):
    record = parse(row)
    assert record == Chat(messages=tuple(messages))
    assert record.without_loss == frozenset()


def test_an_empty_history_leaves_a_prompt():
    assert parse({"instruction": "a", "output": "b", "history": [], "system": ""}) == PAIR


@pytest.mark.parametrize(
    ("field", "value", "variables"),
    [
        ("tools", [TOOL], {"tools": [TOOL]}),
        ("tools", json.dumps([TOOL]), {"tools": [TOOL]}),
        ("tools", [json.dumps(TOOL["function"])], {"tools": [TOOL]}),
        ("tools", [TOOL["function"]], {"tools": [TOOL]}),
        ("functions", [TOOL["function"]], {"tools": [TOOL]}),
        ("tools", "[]", {}),
        ("tools", "", {}),
        ("documents", [{"title": "t", "text": "x"}], {"documents": [{"title": "t", "text": "x"}]}),
        ("chat_template_kwargs", {"enable_thinking": False}, {"enable_thinking": False}),
        ("chat_template_kwargs", '{"enable_thinking": true}', {"enable_thinking": True}),
    ],
)
@pytest.mark.parametrize("row", [{"messages": TURNS}, {"prompt": "a", "completion": "b"}])
def test_input_of_the_template_beside_a_record(row, field, value, variables):
    record = parse({**row, field: value})
    expected = Chat(messages=tuple(TURNS), variables=variables)
    assert record == (PAIR if not variables and "prompt" in row else expected)


def test_of_a_conversational_pair_the_completion_alone_carries_loss():
    row = {"prompt": [*TURNS, MORE[0]], "completion": [MORE[1]], "system": "s"}
    expected = Chat(messages=(SYSTEM, *TURNS, *MORE), without_loss=frozenset([2]))
    assert parse(row) == parse(row, "chat") == parse(row, "prompt") == expected


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": TURNS, "id": 7, "score": 0, "note": "", "more": None}, ["id", "score"]),
        ({"messages": TURNS, "prompt": "a", "context": "c"}, ["prompt", "context"]),
        ({"text": "a", "history": [["a", "b"]]}, ["history"]),
        ({"prompt": "a", "completion": "b", "text": "ab", "label": False}, ["text", "label"]),
        ({"messages": TURNS, "chosen": TURNS, "rejected": TURNS}, ["chosen", "rejected"]),
        ({"question": "a", "context": "c", "answer": "b", "system": "s", "tools": "[]"}, []),
    ],
)
def test_fields_that_no_one_used_are_known(row, unread):
    fields = Fields(row, "set:1")
    rows.parse(fields, "auto")
    assert fields.unread() == unread


def test_format_overrides_the_order():
    row = {"text": "t", "prompt": "p", "completion": "c", "messages": TURNS}
    assert isinstance(parse(row, "chat"), Chat)
    assert isinstance(parse(row, "prompt"), Prompt)
    assert isinstance(parse(row, "text"), Text)


@pytest.mark.parametrize("format", ["auto", "chat", "prompt", "text"])
def test_fields_that_are_absent_are_named_with_those_found(format):
    with pytest.raises(UserError, match=r"^set:1: the fields are colour, size; ") as e:
        parse({"colour": 1, "size": 2}, format)
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
            "messages\\[1\\]: content is missing or null",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'.*user"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown from 'alien'"),
        ({"messages": [{"role": "user"}]}, "content is missing or null; the turn has role"),
        ({"messages": TURNS, "system": 3}, "system must be a string, not 3"),
        ({"messages": [SYSTEM, *TURNS], "system": "t"}, "'t' differs from .* 's', .* remove one"),
        ({"messages": TURNS, "system": "s", "system_prompt": "t"}, "differ; remove one"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history must be a list of"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history\\[0\\] must be"),
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, "a string, not null"),
        ({"prompt": "a", "completion": "b", "context": ["c"]}, "context must be a string"),
        ({"prompt": TURNS, "completion": "b"}, "both as lists of turns, or both as strings"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data.* rename the field"),
        ({"chosen": TURNS, "rejected": TURNS}, "preference data"),
        ({"messages": TURNS, "images": ["a.png"]}, "images in it; only text"),
        ({"messages": TURNS, "tools": "no"}, "tools must be a list of tools, not 'no'"),
        ({"messages": TURNS, "tools": [3]}, "tools\\[0\\] must be .*function"),
        ({"messages": TURNS, "tools": [{"function": {"name": 3}}]}, "name must be a string"),
        ({"messages": TURNS, "tools": [TOOL], "functions": [TOOL]}, "remove one"),
        ({"messages": TURNS, "documents": ["x"]}, "documents must be .*as context"),
        ({"messages": TURNS, "chat_template_kwargs": 3}, "must be an object, not 3"),
        ({"messages": TURNS, "chat_template_kwargs": {"messages": []}}, "cannot give messages"),
        ({"messages": [{"content": "x"}]}, "role is missing; the turn has content"),
    ],
)
def test_bad_rows_name_place_field_and_value(row, message):
    with pytest.raises(UserError, match=message) as e:
        parse(row)
    assert str(e.value).startswith("set:1: ")


def test_where_is_kept_but_is_not_part_of_the_value():
    assert Text(text="a", where="x:1") == Text(text="a", where="y:2")
