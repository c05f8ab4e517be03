"""Test conversations: features of chat records that templates write in different ways."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A conversation in the form of a data set's record.

    Attributes:
      messages: turns of the conversation.
      tools: functions that the model may call.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


def turns(*pairs: tuple[str, str | None], **more: Any) -> tuple[dict[str, Any], ...]:
    """Returns turns of (role, content)."""
    return tuple({"role": role, "content": content} for role, content in pairs)


def call(arguments: Any, content: str | None = None, n: int = 1, **more: Any) -> dict[str, Any]:
    """Returns a turn that calls a function n times."""
    calls = [
        {
            "id": f"call0000{i}",
            "type": "function",
            "function": {"name": "weather", "arguments": arguments},
        }
        for i in range(n)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def result(text: str, n: int = 0) -> dict[str, Any]:
    """Returns the turn with a function's result."""
    return {"role": "tool", "content": text, "name": "weather", "tool_call_id": f"call0000{n}"}


ASK, ANSWER = ("user", "How warm is it?"), ("assistant", "Quite warm today.")
AGAIN, SECOND = ("user", "And tomorrow, then?"), ("assistant", "Colder by far.")
SYSTEM = ("system", "Answer as a sailor.")
THOUGHT = "<think>\nIt is June here.\n</think>\n\n"
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells how warm it is.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "A town."}},
                "required": ["place"],
            },
        },
    },
)
PLACE = {"place": "Reykjavik"}
LOOKED = result('{"warmth": 12}')


def reasoned(content: str, reasoning: str) -> dict[str, Any]:
    """Returns an answer whose reasoning is in the separate field `reasoning_content`."""
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}


CASES: Mapping[str, Case] = {
    "one answer": Case(turns(ASK, ANSWER)),
    "two answers": Case(turns(ASK, ANSWER, AGAIN, SECOND)),
    "three answers": Case(
        turns(ASK, ANSWER, AGAIN, SECOND, ("user", "Sure?"), ("assistant", "Yes!"))
    ),
    "system": Case(turns(SYSTEM, ASK, ANSWER)),
    "system, two answers": Case(turns(SYSTEM, ASK, ANSWER, AGAIN, SECOND)),
    "answer begins with spaces": Case(turns(ASK, ("assistant", "  two in front"), AGAIN, SECOND)),
    "answer ends with lines": Case(turns(ASK, ("assistant", "two after\n\n"), AGAIN, SECOND)),
    "empty answer": Case(turns(ASK, ("assistant", ""), AGAIN, SECOND)),
    "answers alike": Case(
        turns(("user", "Yes"), ("assistant", "Yes"), ("user", "Yes"), ("assistant", "Yes"))
    ),
    "code and lists": Case(turns(ASK, ("assistant", "- one\n- two\n\n```py\nx = {'a': 1}\n```"))),
    "other scripts": Case(
        turns(("user", "天気は？ 🌞"), ("assistant", "暑い 🥵 — très chaud"), AGAIN, SECOND)
    ),
    "ends with a question": Case(turns(ASK, ANSWER, AGAIN)),
    "think block": Case(turns(ASK, ("assistant", THOUGHT + "Quite warm."))),
    "think blocks": Case(
        turns(
            ASK,
            ("assistant", THOUGHT + "Quite warm."),
            AGAIN,
            ("assistant", "<think>\nJuly next.\n</think>\n\nColder."),
        )
    ),
    "reasoning": Case((*turns(ASK), reasoned("Quite warm.", "It is June here."))),
    "reasoning, two answers": Case(
        (
            *turns(ASK),
            reasoned("Quite warm.", "It is June here."),
            *turns(AGAIN),
            reasoned("Colder.", "July next."),
        )
    ),
    "tool call": Case((*turns(ASK), call(PLACE), LOOKED, *turns(ANSWER)), TOOLS),
    "tool call in JSON text": Case(
        (*turns(ASK), call('{"place": "Reykjavik"}'), LOOKED, *turns(ANSWER)), TOOLS
    ),
    "tool call, content empty": Case((*turns(ASK), call(PLACE, ""), LOOKED, *turns(ANSWER)), TOOLS),
    "two calls at once": Case(
        (*turns(ASK), call(PLACE, n=2), LOOKED, result("13 degrees", 1), *turns(ANSWER)), TOOLS
    ),
    "call after a text": Case(
        (*turns(ASK), call(PLACE, "I shall look."), LOOKED, *turns(ANSWER)), TOOLS
    ),
    "call with reasoning, then more": Case(
        (
            *turns(ASK),
            call(PLACE, "", reasoning_content="It is June here."),
            LOOKED,
            *turns(ANSWER, AGAIN, SECOND),
        ),
        TOOLS,
    ),
    "tools that are not used": Case(turns(ASK, ANSWER), TOOLS),
}
