"""Shows decoded training examples; the targets (tokens that carry loss) are marked."""

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from qlora_jax.data.encode import Example
from qlora_jax.runtime.streams import printable
from qlora_jax.text.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"


def preview(examples: Sequence[Example], tokenizer: Tokenizer, n: int) -> Text:
    """Returns the first n examples as text with special tokens; targets are in ⟦ ⟧ and coloured.

    Print the result with a rich Console. Its `.plain` is the text without colour.
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
    """Returns one example as text; tokens with and without loss are decoded in separate runs."""
    edges = np.flatnonzero(np.diff(example.target)) + 1
    out = Text()
    for ids, target in zip(np.split(example.ids, edges), np.split(example.target, edges)):
        text = printable(tokenizer.decode(ids, skip_special_tokens=False))
        if target[0]:
            out.append(f"{OPEN}{text}{CLOSE}", "green")
        else:
            out.append(text, "dim")
    return out
