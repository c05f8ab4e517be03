"""Sets the share of a GPU's memory that a run may use; must run before jax is imported."""

import os
from collections.abc import MutableMapping

FRACTION = 0.95
"""Share of the free memory for jax's allocator; the remainder is for libraries' workspaces."""

CONTEXT = 2**29
"""Bytes that CUDA's context and code take first; 0.3 to 0.5 GB on current cards."""

VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def claim(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets jax take `FRACTION` of the GPU instead of 3/4; does not change a value that is set."""
    environment.setdefault(VARIABLE, str(FRACTION))


def usable(memory: int) -> int:
    """Returns the bytes that a run can use on a GPU with `memory` bytes."""
    return int(FRACTION * (memory - CONTEXT))
