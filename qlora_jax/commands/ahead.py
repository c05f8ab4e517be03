"""Tells how long a command takes before it starts; `runtime.expected` has the rates."""

from typing import TYPE_CHECKING

from qlora_jax.commands.common import say
from qlora_jax.runtime import expected

if TYPE_CHECKING:
    from qlora_jax.models.config import DecoderConfig


def tell(*works: str, **amounts: float) -> None:
    """Prints the time of these works, keys of `expected.PHASES`, unless it is short."""
    if line := expected.line(works, **amounts):
        say(line)


def parameters(model: "DecoderConfig") -> int:
    """The pretrained parameters of a model."""
    from qlora_jax.plan import ledger

    return ledger.parameters(model)


def matrices(model: "DecoderConfig") -> int:
    """The weights of two axes of a model: its linears, with embedding and head."""
    from qlora_jax.models.parts import expected_shapes

    return sum(len(shape) == 2 for shape in expected_shapes(model).values())
