"""The text of an answer while its tokens arrive."""

from collections.abc import Callable, Sequence

INCOMPLETE = "�"
"""What a decoder writes for bytes that are no whole character, or not yet one."""


class Answer:
    """Turns a row's ids into text that never has to be taken back.

    Held back are a character whose bytes are not all there, and what may be the beginning of a
    stop text.

    Args:
      decode: ids to text.
      stop: texts that end the answer; they and what follows are no part of it. Of several, the
        one that is whole after the fewest ids ends it.

    Attributes:
      tokens: how many ids the answer took, those of the stop text included.
      stopped: whether a stop text came.
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
        """The text that these further ids make certain; after a stop text, nothing."""
        if self.stopped:
            return ""
        before = len(self._ids)
        self._ids.extend(ids)
        text = self._decode(self._ids)
        end = self._found(text)
        if end is None:
            return self._show(text, self._certain(text))
        self.stopped = True
        # which id completed it must not depend on how many came at once
        count = next(
            n
            for n in range(before + 1, len(self._ids) + 1)
            if self._found(self._decode(self._ids[:n])) is not None
        )
        del self._ids[count:]
        text = self._decode(self._ids)
        return self._show(text, self._found(text) or 0)

    def finish(self) -> str:
        """What was held back; no more ids come."""
        text = "" if self.stopped else self._decode(self._ids)
        return self._show(text, len(text))

    def _found(self, text: str) -> int | None:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(places, default=None)

    def _certain(self, text: str) -> int:
        """How much of the text can neither change nor turn out to begin a stop text."""
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
