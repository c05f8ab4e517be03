"""How much of a GPU's memory a run may use. To be asked for before jax is imported."""

import os
from collections.abc import MutableMapping

FRACTION = 0.95
"""Share of the free memory that jax's allocator takes; the rest is for libraries' workspaces."""

CONTEXT = 2**29
"""Bytes that CUDA's context and code take before; 0.3 to 0.5 GB on the cards of these years."""

VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def claim(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets jax take `FRACTION` of the GPU instead of three quarters; a value that is set stays."""
    environment.setdefault(VARIABLE, str(FRACTION))


def usable(memory: int) -> int:
    """Bytes that a run can hold on a GPU with `memory` bytes."""
    return int(FRACTION * (memory - CONTEXT))
