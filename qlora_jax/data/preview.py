"""Shows what the model is trained on: decoded examples with the loss-bearing part marked."""

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from qlora_jax.data.encode import Example
from qlora_jax.runtime.streams import printable
from qlora_jax.text.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"


def preview(examples: Sequence[Example], tokenizer: Tokenizer, n: int) -> Text:
    """The first n examples, special tokens included, targets between ⟦ and ⟧ and in colour.

    Print it with a rich Console; `.plain` is the text without colour.
    """
    blocks = [
        Text.assemble(
            (f"example {number}: {len(e.ids)} tokens, {int(e.target.sum())} with loss\n", "bold"),
            marked(e, tokenizer),
            "\n",
        )
        for number, e in enumerate(examples[:n], 1)
    ]
    return Text("\n").join(blocks)


def marked(example: Example, tokenizer: Tokenizer) -> Text:
    """One example, decoded run by run."""
    edges = np.flatnonzero(np.diff(example.target)) + 1
    out = Text()
    for ids, target in zip(np.split(example.ids, edges), np.split(example.target, edges)):
        text = printable(tokenizer.decode(ids, skip_special_tokens=False))
        if target[0]:
            out.append(f"{OPEN}{text}{CLOSE}", "green")
        else:
            out.append(text, "dim")
    return out
