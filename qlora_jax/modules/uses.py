"""What a model's call does with each weight, recorded from one abstract call."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

from qlora_jax.modules.axes import Axes

PATH = "kernel_path"
"""The key of a variable's metadata that holds its path while uses are recorded."""


class Use(NamedTuple):
    """What an operation did with a weight.

    Attributes:
      name: the weight's name, or its path.
      kind: "product", "rows", or "decoded" where it needed the whole weight.
      operation: the name of JAX's primitive.
      axes: those of a product of a weight whose axes were not known.
    """

    name: str
    kind: str
    operation: str
    axes: Axes | None = None


_recorded: contextvars.ContextVar[list[Use] | None] = contextvars.ContextVar("uses", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Use]]:
    """Collects the uses of all variables that have a `PATH`, by this path."""
    uses: list[Use] = []
    token = _recorded.set(uses)
    try:
        yield uses
    finally:
        _recorded.reset(token)


def recorded() -> list[Use] | None:
    """Returns where uses are collected; None where nobody asks for them."""
    return _recorded.get()
