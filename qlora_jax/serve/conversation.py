"""A conversation with a model: whole turns in, text as it is generated out."""

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.engine import SamplingSettings
from qlora_jax.serve.scheduler import AnswerPiece, Job, Refused, Scheduler
from qlora_jax.text.messages import Message
from qlora_jax.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "full", "interrupted"]
"""Who or what ended an answer: the model, the limit of its tokens, of all positions, the user."""


class Answered(NamedTuple):
    """An answer.

    Attributes:
      text: the text, as it was handed on.
      finish: what ended it.
      prompt_tokens: ids of the conversation before it.
      tokens: ids it took, a stop id included.
      first_s: seconds to its first text.
      seconds: seconds to its end.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int
    first_s: float
    seconds: float


class Conversation:
    """The turns so far, all of which go through the chat template for each answer.

    Args:
      scheduler: answers one at a time, and nobody else uses it.
      tokenizer: the model's; it has a chat template.
      length: most positions of a conversation.
      settings: how answers are drawn.
      most: most tokens of an answer.
      system: the system turn, or None.

    Attributes:
      system: the system turn; it may be changed, and holds for the whole conversation.
      messages: the turns after it.
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
        """Forgets the turns; the system turn stays."""
        self.messages = []

    def ask(
        self,
        question: str,
        model: str,
        on_text: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answered:
        """Answers a question. What was said of the answer, if anything, stays with it.

        Args:
          question: the user's turn.
          model: name of who answers.
          on_text: called with each further piece of text; pieces are never taken back.
          stopped: asked between pieces; true ends the answer.

        Raises:
          UserError: the template refuses the conversation, or it is too long. It stays as it was.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt = self._prompt(asked)
        room = self._length - len(prompt)
        pieces: list[AnswerPiece] = []
        times: list[float] = []

        def listen(piece: AnswerPiece | Refused) -> None:
            assert isinstance(piece, AnswerPiece), piece  # one job at a time is never refused later
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
        return Answered(
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
                f"the conversation has {len(prompt)} tokens with this turn, and the model has room "
                f"for {self._length} with the answer; /reset begins a new one, or write less"
            )
        return prompt
