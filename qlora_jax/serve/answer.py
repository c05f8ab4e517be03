"""Turns the token ids of an answer into text while they arrive."""

from collections.abc import Callable, Sequence

INCOMPLETE = "�"
"""The character that a decoder writes for bytes that do not form a whole character."""


class Answer:
    """The text of one answer, returned in parts that never change later.

    The answer holds text back in two cases: a character is incomplete because some of its bytes
    are missing, or the text may be the beginning of a stop text.

    Args:
      decode: function from ids to text.
      stop: texts that end the answer; a stop text and all text after it are not part of the
        answer. Of several, the one that is complete after the fewest ids ends it.

    Attributes:
      tokens: number of ids of the answer, including the ids of the stop text.
      stopped: whether a stop text ended the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        self._shown = 0
        self.stopped = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def add(self, ids: Sequence[int]) -> str:
        """Adds ids and returns the new text that can no longer change; empty after a stop text."""
        if self.stopped:
            return ""
        before = len(self._ids)
        self._ids.extend(ids)
        text = self._decode(self._ids)
        end = self._found(text)
        if end is None:
            return self._show(text, self._certain(text))
        self.stopped = True
        # find the id that completed the stop text, so that the result does not depend on the chunks
        count = next(
            n
            for n in range(before + 1, len(self._ids) + 1)
            if self._found(self._decode(self._ids[:n])) is not None
        )
        del self._ids[count:]
        text = self._decode(self._ids)
        return self._show(text, self._found(text) or 0)

    def finish(self) -> str:
        """Ends the answer and returns the text that was held back."""
        text = "" if self.stopped else self._decode(self._ids)
        return self._show(text, len(text))

    def _found(self, text: str) -> int | None:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(places, default=None)

    def _certain(self, text: str) -> int:
        """Returns the length of the text that cannot change and does not begin a stop text."""
        whole = text.rstrip(INCOMPLETE)
        held = max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(whole)) + 1)
                if whole.endswith(stop[:size])
            ),
            default=0,
        )
        return len(whole) - held

    def _show(self, text: str, end: int) -> str:
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
