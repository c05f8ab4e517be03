"""Where the answers lie in a rendered conversation."""

import itertools
from collections.abc import Callable, Sequence

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.messages import Message, Variables
from qlora_jax.text.tokenizer import NO_VARIABLES, Tokenizer

Span = tuple[int, int]


def render_with_answers(
    messages: Sequence[Message], tokenizer: Tokenizer, variables: Variables = NO_VARIABLES
) -> tuple[str, Callable[[int], list[Span]]]:
    """Renders a conversation through the chat template.

    Returns:
      The text, and a function that returns the character spans of the answers that start before
      a character. A span starts where generation would start and ends after the end-of-turn text.
      It comes from the template's own `{% generation %}` blocks, or else from rendering the
      conversation up to the answer and through it. An assistant's turn at the very start answers
      nothing and has no span.

    Raises:
      UserError: no template, or one that refuses the conversation. The function raises it for a
        template under which an answer cannot be located.
    """
    if tokenizer.template_marks_answers:
        text, marked = tokenizer.render_marked(messages, variables=variables)
        spans = [(start, _after_stop(text, end, tokenizer)) for start, end in marked]
        return text, lambda end: [span for span in spans if span[0] < end]
    text = tokenizer.render(messages, False, variables)
    turns = [i for i, m in enumerate(messages) if i > 0 and m["role"] == "assistant"]

    def answers(end: int) -> list[Span]:
        # Each answer takes two renderings of all before it: those after the end are not looked for.
        spans = (_span(text, messages, turn, tokenizer, variables) for turn in turns)
        return list(itertools.takewhile(lambda span: span[0] < end, spans))

    return text, answers


def _span(
    text: str, messages: Sequence[Message], turn: int, tokenizer: Tokenizer, variables: Variables
) -> Span:
    before = tokenizer.render(messages[:turn], True, variables)
    if not text.startswith(before):
        raise UserError(
            f"the chat template of {tokenizer.source} writes the conversation before turn "
            f"{turn + 1} differently when it asks for the answer, so training would not match "
            "generation; use a template whose generation prompt is a prefix of the conversation"
        )
    start = len(before)
    last = turn + 1 == len(messages)
    through = text if last else tokenizer.render(messages[: turn + 1], False, variables)
    if text.startswith(through):
        end = len(through)
    else:
        end = _end_by_content(text, start, through, messages[turn]["content"].strip())
    if end < start:
        raise UserError(
            f"the chat template of {tokenizer.source} writes turn {turn + 1} differently when more "
            "turns follow, so its end cannot be located; end the conversation there, or add "
            "{% generation %} blocks to the template"
        )
    return start, start + len(text[start:end].rstrip())


def _end_by_content(text: str, start: int, through: str, content: str) -> int:
    """End of a turn that some templates write differently once it is not the last; -1 if unknown.

    Such templates drop or add what stands before the content (a thinking block), not what follows
    it: the content with what follows it in the shorter conversation is looked for.
    """
    tail = through[through.rfind(content) + len(content) :] if content in through else None
    if not content or tail is None:
        return -1
    found = text.find(content + tail, start)
    if found < 0 or text[start:found].strip():
        return -1
    return found + len(content) + len(tail)


def _after_stop(text: str, end: int, tokenizer: Tokenizer) -> int:
    end -= len(text[:end]) - len(text[:end].rstrip())
    stop = next((s for s in tokenizer.stop_texts if text.startswith(s, end)), "")
    return end + len(stop)
