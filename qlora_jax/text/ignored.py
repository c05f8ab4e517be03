"""Finds the parts of a conversation that its chat template does not write."""

from collections.abc import Callable, Mapping, Sequence

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.messages import REASONING, Message, Variables

PLAIN = ("role", "content")
Write = Callable[[Sequence[Message], Variables], str]


def ignored(messages: Sequence[Message], variables: Variables, write: Write) -> list[str]:
    """Returns the names of variables and of keys of turns that do not change the rendered text.

    Args:
      messages: turns of the conversation.
      variables: further input of the template.
      write: function that renders turns with variables.
    """
    keys = dict.fromkeys(key for m in messages for key in m if key not in PLAIN)
    if not keys and not variables:
        return []

    def changes_nothing(messages: Sequence[Message], variables: Variables) -> bool:
        try:
            return write(messages, variables) == text
        except UserError:  # the template needs the removed value
            return False

    text = write(messages, variables)
    # The keys of `REASONING` are synonyms, and a template reads only one of them.
    groups = {key: REASONING if key in REASONING else (key,) for key in keys}
    found = [
        group[0]
        for group in dict.fromkeys(groups.values())
        if changes_nothing([_without(m, group) for m in messages], variables)
    ]
    return found + [v for v in variables if changes_nothing(messages, _without(variables, (v,)))]


def _without(tree: Mapping[str, object], keys: Sequence[str]) -> Mapping[str, object]:
    return {key: value for key, value in tree.items() if key not in keys}
