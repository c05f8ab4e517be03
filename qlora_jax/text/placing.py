"""Finds where a chat template writes the content of each turn.

A character that no text has is put before the last word of each content, and the conversation is
rendered once more. Where the characters come out is where the contents are. Before the last word
they change nothing that a template looks at: it strips white space, cuts a thinking block off the
front, or asks how a content begins and ends.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from qlora_jax.text.messages import Message

FIRST_MARK = 0xF0000
"""The first private-use character of Unicode's plane 15; turn n has the n-th after it."""
MARKS = 0xFFFE
"""Private-use characters of that plane."""
MARK = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + MARKS - 1)}]")


@dataclasses.dataclass(frozen=True)
class Placed:
    """A rendered conversation and the places of its contents.

    Attributes:
      text: the conversation as the template writes it.
      turns: the number of turns.
      ends: turn to the character after its content, where it was written last; without the turns
        whose content is blank or was not written.
      known: whether the places are known at all. If not, `ends` is empty.
    """

    text: str
    turns: int
    ends: Mapping[int, int]
    known: bool

    def start(self, turn: int, content: str) -> int:
        """Returns the first character of a content, a thinking block that was left out aside.

        Args:
          turn: the turn, whose end is known.
          content: its content.
        """
        end = self.ends[turn]
        for part in (content, content.rpartition("</think>")[2], content.split()[-1]):
            if self.text.endswith(part.strip(), 0, end):
                return end - len(part.strip())
        return end


def place(
    messages: Sequence[Message], render: Callable[[Sequence[Message]], str], text: str | None = None
) -> Placed:
    """Renders a conversation and finds its contents.

    Args:
      messages: the turns.
      render: writes turns as the template does.
      text: what `render` writes for the turns, if it is known.
    """
    text = render(messages) if text is None else text
    unknown = Placed(text, len(messages), {}, False)
    if len(messages) > MARKS or MARK.search(text):
        return unknown
    pairs = [_marked(turn, message) for turn, message in enumerate(messages)]
    plain, found = _read(render([message for message, _ in pairs]))
    if plain != text:
        return unknown  # the template read a mark as content
    ends = {}
    for turn, at in found.items():
        word = pairs[turn][1]
        if text.startswith(word, at):
            ends[turn] = at + len(word)
    return Placed(text, len(messages), ends, True)


def _marked(turn: int, message: Message) -> tuple[Message, str]:
    """Returns a turn with its mark, and its content's last word; a blank content has no mark."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return message, ""
    core = content.rstrip()
    word = core.split()[-1]
    at = len(core) - len(word)
    return {**message, "content": core[:at] + chr(FIRST_MARK + turn) + content[at:]}, word


def _read(marked: str) -> tuple[str, dict[int, int]]:
    """Returns a text without its marks, and where the mark of each turn was last."""
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
