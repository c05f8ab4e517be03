"""Finds the answers in a rendered conversation.

Generation starts after the prompt of an answer: the turns before the answer, rendered with the
template's generation prompt. Training uses the same prompt. Most templates write the same text
before an answer, no matter which turns follow. If a template does not, the answer gets a separate
text, in which it is the last turn.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.content_positions import ContentPositions, locate_contents
from qlora_jax.text.messages import Message, Variables
from qlora_jax.text.tokenizer import NO_VARIABLES, Tokenizer

Span = tuple[int, int]
APART = (
    "answers are separate examples, because the chat template writes the text before them "
    "differently if more turns follow"
)
UNREASONED = "answers have their reasoning left out by the chat template"
BESIDE_CALLS = "answers have the text next to their tool calls left out by the chat template"
UNLIKE = "writes a generation prompt that differs from the text before"
LONGEST_TOKEN = 64
"""Maximum length of a special token, in characters."""
UNOPENED = "answers do not begin with {}, with which the chat template's prompt ends"


class LocatedAnswers(NamedTuple):
    """The answers of a conversation.

    Attributes:
      spans: characters of each answer in the conversation's text, with its end-of-turn text.
      separate: separate texts, each of which ends with one answer, and the span of this answer.
      notes: maps a warning about answers to the number of these answers.
    """

    spans: list[Span]
    separate: list[tuple[str, Span]]
    notes: Mapping[str, int]


class _Answer(NamedTuple):
    """An answer: its separate text or None, its span in this text, and warnings about it."""

    text: str | None
    span: Span
    notes: tuple[str, ...]


def render_with_answers(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    variables: Variables = NO_VARIABLES,
    without_loss: frozenset[int] = frozenset(),
) -> tuple[str, Callable[[int], LocatedAnswers]]:
    """Renders a conversation through the chat template.

    Args:
      messages: turns of the conversation.
      tokenizer: tokenizer with a chat template.
      variables: further input of the template.
      without_loss: positions of turns whose answers are not needed.

    Returns:
      The text, and a function that takes a character position and returns the answers that start
      before it. A span starts where generation would start, and ends after the end-of-turn text.
      If the template has `{% generation %}` blocks, they give the spans. An assistant's turn at
      the start of the conversation is not an answer and has no span.

    Raises:
      UserError: there is no template, or the template refuses the conversation. The returned
        function raises UserError if an answer cannot be located or the template leaves out a turn.
    """
    every = [turn for turn, m in enumerate(messages) if m["role"] == "assistant"]
    turns = [turn for turn in every if turn > 0 and turn not in without_loss]
    if tokenizer.template_marks_answers:
        return _marked_by_template(messages, tokenizer, variables, every, turns)
    chat = _Chat(messages, tokenizer, variables)
    return chat.text, functools.partial(_find, chat, turns)


def _marked_by_template(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    variables: Variables,
    every: Sequence[int],
    turns: Sequence[int],
) -> tuple[str, Callable[[int], LocatedAnswers]]:
    """Renders a conversation, and finds the answers by the `{% generation %}` blocks."""
    text, blocks = tokenizer.render_marked(messages, variables=variables)
    spans = [(start, _after_stop(text, end, tokenizer)) for start, end in blocks]
    if {*every} - {*turns, 0}:
        if len(every) != len(spans):
            raise UserError(
                f"the chat template of {tokenizer.template_source} marks {len(spans)} answers of "
                f"{len(every)}, so the answers without loss cannot be found; give another template "
                "as data.chat_template"
            )
        spans = [span for turn, span in zip(every, spans) if turn in turns]
    return text, lambda end: LocatedAnswers([span for span in spans if span[0] < end], [], {})


def _after_stop(text: str, end: int, tokenizer: Tokenizer) -> int:
    """Returns the end of the stop text at `end`; without stop text, the end of the answer's text.

    White space before `end` does not count as part of the answer.
    """
    end -= len(text[:end]) - len(text[:end].rstrip())
    stop = next((s for s in tokenizer.stop_texts if text.startswith(s, end)), "")
    return end + len(stop)


@dataclasses.dataclass(frozen=True)
class _Chat:
    """A conversation and its renderings."""

    messages: Sequence[Message]
    tokenizer: Tokenizer
    variables: Variables

    @functools.cached_property
    def text(self) -> str:
        return self.write(self.messages, ask=False)

    @functools.cached_property
    def whole(self) -> ContentPositions:
        return locate_contents(self.messages, functools.partial(self.write, ask=False), self.text)

    def write(self, messages: Sequence[Message], ask: bool) -> str:
        """Renders turns; with `ask`, the text ends with the generation prompt."""
        return self.tokenizer.render(messages, ask, self.variables)

    def through(self, turn: int) -> ContentPositions:
        """Renders the conversation up to and including a turn."""
        if turn + 1 == len(self.messages):
            return self.whole
        return locate_contents(self.messages[: turn + 1], functools.partial(self.write, ask=False))

    def before(self, turn: int, text: str) -> ContentPositions:
        """Finds the contents of the turns in `text`, the prompt of a turn."""
        return locate_contents(self.messages[:turn], functools.partial(self.write, ask=True), text)

    def content(self, turn: int) -> str:
        """Returns the content of a turn, or an empty string if there is none."""
        content = self.messages[turn].get("content")
        return content.strip() if isinstance(content, str) else ""

    def fault(self, turn: int, what: str) -> UserError:
        """Returns the error for a template that makes training on a turn impossible."""
        return UserError(
            f"the chat template of {self.tokenizer.template_source} {what} turn {turn + 1} "
            f"({self.messages[turn]['role']}); give another template as data.chat_template"
        )


def _find(chat: _Chat, turns: Sequence[int], end: int) -> LocatedAnswers:
    """Finds the answers that start before a character of the conversation's text."""
    spans: list[Span] = []
    apart: list[tuple[str, Span]] = []
    notes: Counter[str] = Counter()
    for turn in turns:
        # Each answer needs a rendering of all turns before it, so skip the answers after `end`.
        if chat.whole.ends.get(turn - 1, 0) >= end:
            break
        answer = _answer(chat, turn)
        if answer.text is not None:
            apart.append((answer.text, answer.span))
        elif answer.span[0] < end:
            spans.append(answer.span)
        notes.update(answer.notes)
    return LocatedAnswers(spans, apart, notes)


def _answer(chat: _Chat, turn: int) -> _Answer:
    """Locates an answer in the conversation's text, or makes a separate text for it.

    Raises:
      UserError: the answer cannot be located, or the template leaves out a turn before it.
    """
    asked = chat.write(chat.messages[:turn], ask=True)
    _check_written(chat, asked, turn)
    reasoning = _reasoning(chat.messages[turn])
    found = _locate(chat, chat.whole, asked, turn)
    if found is not None and not found.notes and reasoning in chat.text[slice(*found.span)]:
        return found
    alone = chat.through(turn)
    own = _locate(chat, alone, asked, turn)
    if own is not None and (found is None or _is_better(own, found, alone, chat.whole, reasoning)):
        return own._replace(text=alone.text[: own.span[1]], notes=(*own.notes, APART))
    if found is None:
        return _splice(chat, alone, asked, turn)
    left_out = reasoning not in chat.text[slice(*found.span)]
    return found._replace(notes=(*found.notes, UNREASONED)) if left_out else found


def _is_better(
    own: _Answer, found: _Answer, alone: ContentPositions, whole: ContentPositions, reasoning: str
) -> bool:
    """Returns whether the separate text `own` is closer to generation than `found`."""
    if len(own.notes) != len(found.notes):
        return len(own.notes) < len(found.notes)
    return (
        reasoning in alone.text[slice(*own.span)]
        and reasoning not in whole.text[slice(*found.span)]
    )


def _check_written(chat: _Chat, asked: str, turn: int) -> None:
    """Raises UserError if the template leaves out a turn before an answer.

    A turn that is missing in the conversation's text can still be in the answer's prompt.
    """
    missing = [j for j in range(turn) if _is_missing(chat, chat.whole, j)]
    if missing:
        before = chat.before(turn, asked)
        for j in missing:
            if _is_missing(chat, before, j):
                raise chat.fault(j, "leaves out")


def _is_missing(chat: _Chat, placed: ContentPositions, turn: int) -> bool:
    calls = chat.messages[turn].get("tool_calls")  # missing text gives BESIDE_CALLS
    if calls or not chat.content(turn):
        return False
    return turn not in placed.ends if placed.known else chat.content(turn) not in placed.text


def _locate(chat: _Chat, placed: ContentPositions, asked: str, turn: int) -> _Answer | None:
    """Locates an answer in a rendering; None if the text before it is not the answer's prompt.

    Args:
      chat: the conversation.
      placed: rendering of the whole conversation, or of its turns up to the answer.
      asked: prompt of the answer.
      turn: position of the answer's turn.
    """
    notes: tuple[str, ...] = ()
    message = chat.messages[turn]
    if _is_missing(chat, placed, turn) and not _reasoning(message):
        return None
    if placed.text.startswith(asked):
        start = len(asked)
    else:
        before = chat.before(turn, asked)
        own, other = before.ends.get(turn - 1), placed.ends.get(turn - 1)
        if own is None or other is None or asked[:own] != placed.text[:other]:
            return None
        shared = _shared(chat, placed, asked[own:], other, turn)
        if shared is None:
            return None
        start = other + shared
        notes = (UNOPENED.format(repr(asked[own + shared :])),)
    span = start, _end(chat, placed, turn, start)
    written = turn in placed.ends and placed.ends[turn] <= span[1]
    if message.get("tool_calls") and chat.content(turn) and not written:
        notes = (*notes, BESIDE_CALLS)
    return _Answer(None, span, notes)


def _shared(chat: _Chat, placed: ContentPositions, header: str, at: int, turn: int) -> int | None:
    """Counts the characters of the answer's header that are also before the answer in `placed`.

    Args:
      chat: the conversation.
      placed: rendering that contains the answer.
      header: part of the answer's prompt after the content of the previous turn.
      at: end of the content of the previous turn in `placed`.
      turn: position of the answer's turn.

    Returns:
      The number of characters; None if text that is neither header nor reasoning is between them
      and the answer's content.
    """
    text = placed.text[at:]
    shared = _common(header, text)
    if not header[shared:].strip():
        return shared
    special = chat.tokenizer.fast.added_tokens_decoder
    ids, offsets = chat.tokenizer.encode_with_offsets(text[: shared + LONGEST_TOKEN])
    for id, (low, high) in zip(ids, offsets):
        if id in special and low < shared < high:
            shared = int(low)  # the difference is inside a special token: cut before it
    own = _reasoning(chat.messages[turn])
    if turn in placed.ends:
        content = placed.start(turn, chat.content(turn)) - at
        shared = min(shared, content)
        if text[shared:content].strip() and not (own and text[shared:].startswith(own)):
            return None
    return shared


def _splice(chat: _Chat, alone: ContentPositions, asked: str, turn: int) -> _Answer:
    """Joins the prompt of an answer with the answer as the template writes it after other text.

    Raises:
      UserError: the prompt and the rendering share no place at which to join them.
    """
    if _is_missing(chat, alone, turn):
        raise chat.fault(turn, "leaves out")
    before = chat.before(turn, asked)
    own, other = before.ends.get(turn - 1), alone.ends.get(turn - 1)
    if own is None or other is None:
        raise chat.fault(turn, UNLIKE)
    shared = _shared(chat, alone, asked[own:], other, turn)
    if shared is None:
        raise chat.fault(turn, UNLIKE)
    start = other + shared
    answer = alone.text[start : _end(chat, alone, turn, start)]
    head = asked[: own + shared]
    return _Answer(head + answer, (len(head), len(head) + len(answer)), (APART,))


def _end(chat: _Chat, placed: ContentPositions, turn: int, start: int) -> int:
    """Returns the end of an answer, after its end-of-turn text.

    The answer ends after the stop texts between its content (or tool calls) and the next content.
    If the template writes no stop text, the end-of-turn text is the text that it writes after the
    conversation's last turn.
    """
    text, calls = placed.text, chat.messages[turn].get("tool_calls")
    content_end = start if calls else placed.ends.get(turn, start)
    following = min((j for j in placed.ends if j > turn), default=None)
    limit = len(text) if following is None else placed.start(following, chat.content(following))
    stops = "|".join(map(re.escape, chat.tokenizer.stop_texts))
    if stop := re.compile(f"(?:{stops})+").search(text, content_end, limit):
        return stop.end()
    end = limit
    if turn + 1 < placed.turns:
        alone = chat.through(turn)
        after, base = alone.ends.get(turn), placed.ends.get(turn)
        if calls or after is None or base is None:
            raise chat.fault(turn, "has no end-of-turn text after")
        end = base + _common(alone.text[after:], text[base:limit])
    return start + len(text[start:end].rstrip())


def _common(a: str, b: str) -> int:
    """Returns the length of the longest common prefix of two texts."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _reasoning(message: Message) -> str:
    """Returns the reasoning of a turn, or an empty string."""
    given = message.get("reasoning_content")
    if isinstance(given, str) and given.strip():
        return given.strip()
    content = message.get("content")
    head, closed, _ = content.partition("</think>") if isinstance(content, str) else ("", "", "")
    return head.rpartition("<think>")[2].strip() if closed else ""
