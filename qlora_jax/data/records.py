"""What one training example is before tokenization."""

import dataclasses
import json

from qlora_jax.text.messages import Message, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; the assistant's turns are the answers.

    Attributes:
      messages: the turns.
      variables: further input of the chat template.
      without_loss: positions of assistant's turns that carry no loss.
      where: file and line, or row, for messages.
    """

    messages: tuple[Message, ...]
    variables: Variables = dataclasses.field(default_factory=dict)
    without_loss: frozenset[int] = frozenset()
    where: str = dataclasses.field(default="", compare=False)

    @property
    def spoken(self) -> str:
        """What is said, without the further keys of the turns and input of the template."""
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)

    @property
    def key(self) -> str:
        """The text that decides whether two records are the same."""
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
        return f"{self.prompt}\n{self.completion}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text; `ends` says that the document ends here and is not continued elsewhere."""

    text: str
    ends: bool = True
    where: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> str:
        return self.text


Record = Chat | Prompt | Text
