"""Records the operations on each weight in one abstract call of a model."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

from qlora_jax.modules.axes import Axes

PATH = "kernel_path"
"""Metadata key of a variable; it holds the variable's path while uses are recorded."""


class Use(NamedTuple):
    """One operation on a weight.

    Attributes:
      name: name or path of the weight.
      kind: "product", "rows" (a look-up), or "decoded" if the operation needed the whole weight.
      operation: name of JAX's primitive.
      axes: axes found by a product or a look-up; None if the weight's axes were known before, or
        the weight was decoded.
    """

    name: str
    kind: str
    operation: str
    axes: Axes | None = None


_recorded: contextvars.ContextVar[list[Use] | None] = contextvars.ContextVar("uses", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Use]]:
    """Collects, while entered, the uses of all variables that have a `PATH`, under this path."""
    uses: list[Use] = []
    token = _recorded.set(uses)
    try:
        yield uses
    finally:
        _recorded.reset(token)


def recorded() -> list[Use] | None:
    """Returns the list of `recording`; None outside of `recording`."""
    return _recorded.get()
