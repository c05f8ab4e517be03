"""Judges how our encoder handles a conversation under a template.

The references: transformers writes the text, and TRL's training templates mark the answers.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chats.conversations import Case
from chats.templates import texts, tokenizer
from qlora_jax.config import DataConfig
from qlora_jax.data.encode import Example, encode
from qlora_jax.data.records import Chat
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.chat import UNOPENED
from qlora_jax.text.tokenizer import Tokenizer

RIGHT, REFUSED, WRONG, NO_TEXT = "right", "refused", "wrong", "no text"
VERDICTS = (RIGHT, REFUSED, WRONG, NO_TEXT)
LENGTH = 1 << 14


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one conversation under one template.

    Attributes:
      template: name of the template.
      case: name of the conversation.
      verdict: one of `VERDICTS`; "no text": the template refuses the conversation itself or does
        not write a part of it.
      detail: error message, notes, or description of the fault.
      compared: whether TRL's training template writes the same text, so that its marks could be
        compared.
    """

    template: str
    case: str
    verdict: str
    detail: str = ""
    compared: bool = False


def judge(template: str, name: str, case: Case) -> Outcome:
    """Encodes a conversation and compares it with the peers' text and marks."""
    own = tokenizer(template)
    record = Chat(
        messages=case.messages, variables={"tools": list(case.tools)} if case.tools else {}
    )
    why = _unwritten(own, case)
    try:
        examples, stats = encode([record], own, DataConfig(source="", sequence_length=LENGTH))
    except UserError as e:
        return Outcome(template, name, NO_TEXT if why else REFUSED, str(e).removeprefix(": "))
    told = " ".join(stats.notes)
    if why and why not in told:
        return Outcome(template, name, WRONG, f"{why}, and nothing was said")
    theirs = _twin(template, own, case, examples)
    fault = next(_faults(own, case, examples, told), "")
    if not fault and theirs is not None:
        fault = _other_marks(theirs, [found.strip() for _, found in _targets(own, examples[0])])
    if fault:
        return Outcome(template, name, WRONG, fault)
    return Outcome(template, name, RIGHT, "; ".join(stats.notes), theirs is not None)


def _peer(own: Tokenizer, messages: Sequence[Mapping[str, Any]], case: Case, ask: bool) -> str:
    """Returns transformers' text of the turns.

    Templates expect tool calls in different forms; the first form that works is used.
    """
    error: Exception | None = None
    for form in FORMS:
        try:
            text = own.fast.apply_chat_template(
                [form(m) for m in messages],
                tools=list(case.tools) or None,
                add_generation_prompt=ask,
                chat_template=own.template,  # our copy of the template, with fixed dates
                tokenize=False,
            )
        except Exception as e:
            error = e
            continue
        if "None" not in text and "{'place'" not in text and '\\"place' not in text:
            return text
    raise error or ValueError("the calls are not written as JSON")


def _as(null: bool, objects: bool) -> Any:
    def form(message: Mapping[str, Any]) -> dict[str, Any]:
        if "tool_calls" not in message:
            return dict(message)
        calls = json.loads(json.dumps(message["tool_calls"]))
        for call in calls:
            arguments = call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            call["function"]["arguments"] = arguments if objects else json.dumps(arguments)
        content = message["content"] or (None if null else "")
        return {**message, "content": content, "tool_calls": calls}

    return form


FORMS = [_as(null, objects) for objects in (True, False) for null in (True, False)]


def _unwritten(own: Tokenizer, case: Case) -> str:
    """Returns what the template refuses or leaves out; an empty string if there is nothing."""
    try:
        text = _peer(own, case.messages, case, ask=False)
        asked = "".join(_peer(own, case.messages[:turn], case, ask=True) for turn in _answers(case))
    except Exception as e:
        return f"transformers: {type(e).__name__}: {e}"
    for message in case.messages:
        words = (message["content"] or "").split()
        if words and words[-1] not in text + asked:
            return "text beside their tool calls" if message.get("tool_calls") else message["role"]
        if message.get("tool_calls") and "Reykjavik" not in text:
            return "tool_calls"
    if case.tools and "Tells how warm it is" not in text:
        return "tools"
    return ""


def _answers(case: Case) -> list[int]:
    return [i for i, m in enumerate(case.messages) if i and m["role"] == "assistant"]


def _faults(own: Tokenizer, case: Case, examples: Sequence[Example], told: str) -> Iterator[str]:
    """Yields the faults of the encoded examples.

    A fault is an answer that is not a target after its prompt, an answer whose target lacks words
    or the end of turn, or a target outside every answer.
    """
    pieces = [piece for example in examples for piece in _targets(own, example)]
    if len(pieces) != len(_answers(case)):
        yield f"{len(pieces)} answers of {len(_answers(case))}"
    for turn in _answers(case):
        prompt = own.encode(_peer(own, case.messages[:turn], case, ask=True))
        found = next((text for head, text in pieces if _same(own, head, prompt)), None)
        if found is None:
            found = next((t for head, t in pieces if _is_told(own, head, prompt, told)), None)
        if found is None:
            yield f"turn {turn}: no answer after {own.decode(prompt[-24:], False)!r}"
            continue
        opened = "<think>" if own.decode(prompt, False).rstrip().endswith("<think>") else ""
        yield from _words(own, case.messages[turn], turn, opened + found, told)


def _same(own: Tokenizer, head: list[int], prompt: list[int]) -> bool:
    """Tells whether ids `head` are the prompt.

    The texts and the last 8 ids must agree. Other ids may differ, because earlier answers may be
    tokenized as they were generated.
    """
    return own.decode(head, False) == own.decode(prompt, False) and head[-8:] == prompt[-8:]


def _is_told(own: Tokenizer, head: list[int], prompt: list[int], told: str) -> bool:
    """Tells whether `head` is the prompt without its end, and a note in `told` names that end."""
    text, begin = own.decode(prompt, False), own.decode(head, False)
    return text.startswith(begin) and UNOPENED.format(repr(text[len(begin) :])) in told


def _words(
    own: Tokenizer, message: Mapping[str, Any], turn: int, found: str, told: str
) -> Iterator[str]:
    calls = [c["function"] for c in message.get("tool_calls", ())]
    wanted = [message["content"] or "", message.get("reasoning_content", "")]
    wanted += [word for c in calls for word in (c["name"], "Reykjavik")]
    for text in wanted:
        body = text.partition("</think>")[2] if "left out by the chat template" in told else text
        if "left out" in told and text == message.get("reasoning_content"):
            continue
        if calls and "beside their tool calls" in told and text == message["content"]:
            continue
        if missing := [w for w in body.split() if w not in found]:
            yield f"turn {turn}: {missing[0]!r} is not in {found!r}"
    if not found.endswith((*own.stop_texts, "<|end|>")):  # GPT-OSS: <|end|> but for the last
        yield f"turn {turn}: no end of turn in {found!r}"
    for other in ("How warm is it?", "tomorrow", "sailor"):
        if other in found:
            yield f"turn {turn}: {other!r} is in {found!r}"


def _targets(own: Tokenizer, example: Example) -> list[tuple[list[int], str]]:
    """Returns, for each run of targets, the ids before the run and the text of the run."""
    found, ids, target = [], example.ids.tolist(), example.target.tolist()
    for start in range(1, len(ids)):
        if target[start] and not target[start - 1]:
            end = next((i for i in range(start, len(ids)) if not target[i]), len(ids))
            found.append((ids[:start], own.decode(ids[start:end], False)))
    return found


def _twin(
    template: str, own: Tokenizer, case: Case, examples: Sequence[Example]
) -> list[str] | None:
    """Returns the answers that TRL's training template marks; None if its text is not ours."""
    _, twin = texts(template)
    if twin is None or len(examples) != 1:
        return None
    try:
        text, blocks = dataclasses.replace(own, template=twin).render_marked(
            case.messages, variables={"tools": list(case.tools)} if case.tools else {}
        )
    except UserError:
        return None
    ids = own.encode(own.decode(examples[0].ids, False))
    if own.encode(text) != ids[: len(own.encode(text))]:
        return None
    theirs = [text[a:b].strip() for a, b in blocks]
    if len(theirs) > 1 and theirs[-1] == own.fast.eos_token and theirs[-2].endswith("<|end|>"):
        theirs.pop()  # Phi-3 writes two end tokens after the last answer
    return theirs


def _other_marks(theirs: Sequence[str], ours: Sequence[str]) -> str:
    if len(theirs) != len(ours):
        return f"TRL marks {len(theirs)} answers, {len(ours)} here"
    for a, b in zip(theirs, ours):
        # For some templates TRL also marks the header of the answer.
        if not a.endswith(b) and not a.startswith(b):
            return f"TRL marks {a!r}, {b!r} here"
    return ""
