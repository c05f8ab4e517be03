"""What an adapter does to one linear, as plain arrays."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Update(NamedTuple):
    """x @ W becomes x @ W + scale * (x @ a) @ b; a [in, r], b [r, out]."""

    a: np.ndarray
    b: np.ndarray
    scale: float


Updates = Mapping[str, Update]
"""One adapter: Hugging Face module path to its update."""


def rank(updates: Updates) -> int:
    """The largest rank among the updates; 0 if there are none."""
    return max((update.a.shape[1] for update in updates.values()), default=0)
