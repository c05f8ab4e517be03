"""Prints an estimate of a command's time before it works; the rates: `runtime.time_estimates`."""

from typing import TYPE_CHECKING

from qlora_jax.commands.common import say
from qlora_jax.runtime import time_estimates

if TYPE_CHECKING:
    from qlora_jax.models.config import DecoderConfig


def tell_expected_time(*works: str, **amounts: float) -> None:
    """Prints the estimated time if it is not short; `works`: keys of `time_estimates.PHASES`."""
    if line := time_estimates.line(works, **amounts):
        say(line)


def parameters(model: "DecoderConfig") -> int:
    """Returns the number of pretrained parameters of a model."""
    from qlora_jax.plan import ledger

    return ledger.parameters(model)


def matrices(model: "DecoderConfig") -> int:
    """Returns the number of a model's matrices: its linears, its embedding and its head."""
    from qlora_jax.models.weight_shapes import expected_shapes

    return sum(len(shape) == 2 for shape in expected_shapes(model).values())
