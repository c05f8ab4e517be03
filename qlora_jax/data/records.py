"""The types of one training record before tokenization: conversation, prompt or text."""

import dataclasses
import json

from qlora_jax.text.messages import Message, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; the assistant's turns are the answers.

    Attributes:
      messages: turns of the conversation.
      variables: further input of the chat template.
      without_loss: positions of the assistant's turns that carry no loss.
      where: file and line, or row, for messages to the user.
    """

    messages: tuple[Message, ...]
    variables: Variables = dataclasses.field(default_factory=dict)
    without_loss: frozenset[int] = frozenset()
    where: str = dataclasses.field(default="", compare=False)

    @property
    def spoken(self) -> str:
        """Roles and contents of the turns, without their other keys and the template variables."""
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)

    @property
    def key(self) -> str:
        """Text that identifies the record: records with the same key are equal."""
        turns = self.spoken
        further = [
            {k: v for k, v in m.items() if k not in ("role", "content")} for m in self.messages
        ]
        if not any(further) and not self.variables:
            return turns
        return f"{turns}\n{json.dumps([further, self.variables], sort_keys=True, default=str)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and the completion that answers it."""

    prompt: str
    completion: str
    where: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> str:
        """Text that identifies the record, as for `Chat`."""
        return f"{self.prompt}\n{self.completion}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text; `ends` is False if the document continues in the next record."""

    text: str
    ends: bool = True
    where: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> str:
        """Text that identifies the record, as for `Chat`."""
        return self.text


Record = Chat | Prompt | Text
