"""A conversation with a model: takes whole turns, returns text while it is generated."""

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.engine import SamplingSettings
from qlora_jax.serve.scheduler import AnswerPiece, Job, Refused, Scheduler
from qlora_jax.text.messages import Message
from qlora_jax.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "full", "interrupted"]
"""Reason for the end of an answer: `stop`, the model; `length`, the limit of the answer's tokens;
`full`, the limit of the conversation's positions; `interrupted`, the user."""


class TimedAnswer(NamedTuple):
    """An answer and its measurements.

    Attributes:
      text: text of the answer, equal to the pieces passed to `on_text`.
      finish: reason for the end of the answer.
      prompt_tokens: number of ids of the conversation before the answer.
      tokens: number of ids of the answer, including a stop id.
      first_s: seconds until the first piece.
      seconds: seconds until the end.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int
    first_s: float
    seconds: float


class Conversation:
    """The turns of a conversation; each answer renders all of them with the chat template.

    Args:
      scheduler: scheduler that only this conversation uses.
      tokenizer: tokenizer of the model; must have a chat template.
      length: largest number of positions of the conversation.
      settings: settings for drawing the tokens.
      most: largest number of tokens of an answer.
      system: text of the system turn, or None.

    Attributes:
      system: text of the system turn. The caller may change it; the change is valid for the whole
        conversation.
      messages: turns after the system turn.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        length: int,
        settings: SamplingSettings,
        most: int,
        system: str | None,
    ):
        self._scheduler, self._tokenizer = scheduler, tokenizer
        self._length, self._settings, self._most = length, settings, most
        self.system = system
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Removes all turns except the system turn."""
        self.messages = []

    def ask(
        self,
        question: str,
        model: str,
        on_text: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> TimedAnswer:
        """Answers a question, and adds question and answer to the conversation.

        If the answer was stopped, the text so far is added; if there was no text, nothing is added.

        Args:
          question: text of the user's turn.
          model: name of the adapter, or of the model, that answers.
          on_text: function called with each new piece of text; a piece never changes later.
          stopped: function called between the pieces; True stops the answer.

        Raises:
          UserError: the template refuses the conversation, or the conversation is too long. The
            conversation does not change.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt = self._prompt(asked)
        room = self._length - len(prompt)
        pieces: list[AnswerPiece] = []
        times: list[float] = []

        def listen(piece: AnswerPiece | Refused) -> None:
            assert isinstance(piece, AnswerPiece), piece  # a single job is only refused by `submit`
            pieces.append(piece)
            times.append(time.monotonic())
            if piece.text:
                on_text(piece.text)

        job = Job(
            prompt=prompt,
            model=model,
            max_tokens=min(self._most, room),
            settings=self._settings,
            listen=listen,
        )
        start = time.monotonic()
        self._scheduler.submit(job)
        while self._scheduler.busy and not stopped():
            self._scheduler.step()
        self._scheduler.cancel(job)
        end = time.monotonic()
        text = "".join(piece.text for piece in pieces)
        finish: Finish = (pieces[-1].finish if pieces else None) or "interrupted"
        if finish == "length" and room < self._most:
            finish = "full"
        if text or finish != "interrupted":
            self.messages = [*asked, {"role": "assistant", "content": text}]
        return TimedAnswer(
            text,
            finish,
            len(prompt),
            pieces[-1].tokens if pieces else 0,
            (times[0] if times else end) - start,
            end - start,
        )

    def _prompt(self, messages: list[Message]) -> list[int]:
        system: list[Message] = []
        if self.system:
            system = [{"role": "system", "content": self.system}]
        prompt = self._tokenizer.encode(self._tokenizer.render([*system, *messages], True))
        if len(prompt) >= self._length:
            raise UserError(
                f"the conversation has {len(prompt)} tokens with this turn, but conversation and "
                f"answer together can have {self._length}; enter /reset or write less"
            )
        return prompt
