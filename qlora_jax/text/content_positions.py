"""Finds the position at which a chat template writes the content of each turn.

The method puts a marker character, which no text contains, before the last word of each content
and renders the conversation again. The positions of the markers are the positions of the contents.
A marker before the last word does not influence the template: templates strip white space, remove
a thinking block at the front, or check how a content begins or ends.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from qlora_jax.text.messages import Message

FIRST_MARK = 0xF0000
"""First private-use character of Unicode's plane 15; the marker of turn n is FIRST_MARK + n."""
MARKS = 0xFFFE
"""Number of private-use characters in plane 15."""
MARK = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + MARKS - 1)}]")


@dataclasses.dataclass(frozen=True)
class ContentPositions:
    """A rendered conversation and the positions of its contents.

    Attributes:
      text: rendered conversation.
      turns: number of turns.
      ends: maps a turn to the end (exclusive) of its content in `text`. If the template writes
        the content more than once, the last position counts. Turns whose content is blank or not
        written are absent.
      known: False if the positions could not be found; `ends` is then empty.
    """

    text: str
    turns: int
    ends: Mapping[int, int]
    known: bool

    def start(self, turn: int, content: str) -> int:
        """Returns the start of a content in `text`.

        If the template left out the content's thinking block, the start is after this block.

        Args:
          turn: position of a turn that is in `ends`.
          content: content of this turn.
        """
        end = self.ends[turn]
        for part in (content, content.rpartition("</think>")[2], content.split()[-1]):
            if self.text.endswith(part.strip(), 0, end):
                return end - len(part.strip())
        return end


def locate_contents(
    messages: Sequence[Message], render: Callable[[Sequence[Message]], str], text: str | None = None
) -> ContentPositions:
    """Renders a conversation, and finds the positions of its contents.

    Args:
      messages: turns of the conversation.
      render: function that renders turns with the chat template.
      text: result of `render(messages)`; None: it is computed.
    """
    text = render(messages) if text is None else text
    unknown = ContentPositions(text, len(messages), {}, False)
    if len(messages) > MARKS or MARK.search(text):
        return unknown
    pairs = [_marked(turn, message) for turn, message in enumerate(messages)]
    plain, found = _read(render([message for message, _ in pairs]))
    if plain != text:
        return unknown  # a marker changed the output of the template
    ends = {}
    for turn, at in found.items():
        word = pairs[turn][1]
        if text.startswith(word, at):
            ends[turn] = at + len(word)
    return ContentPositions(text, len(messages), ends, True)


def _marked(turn: int, message: Message) -> tuple[Message, str]:
    """Returns the turn with a marker before its last word, and this word; '' if blank."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return message, ""
    core = content.rstrip()
    word = core.split()[-1]
    at = len(core) - len(word)
    return {**message, "content": core[:at] + chr(FIRST_MARK + turn) + content[at:]}, word


def _read(marked: str) -> tuple[str, dict[int, int]]:
    """Returns the text without markers, and the last position of each turn's marker in it."""
    found: dict[int, int] = {}
    plain: list[str] = []
    length = begin = 0
    for mark in MARK.finditer(marked):
        at = mark.start()
        plain.append(marked[begin:at])
        length += at - begin
        begin = at + 1
        found[ord(marked[at]) - FIRST_MARK] = length
    return "".join([*plain, marked[begin:]]), found
