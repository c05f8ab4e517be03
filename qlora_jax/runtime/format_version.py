"""The format version of a run's manifest and checkpoints.

A program reads all versions up to `NEWEST`. Files without a version have version 1.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.runtime.errors import UserError

KEY = "format"
NEWEST = 1
"""Version that this program writes; increase it when the meaning of the content changes."""


def check(values: Mapping[str, Any], where: object) -> None:
    """Raises UserError, which names `where`, if a newer program wrote the values."""
    version = values.get(KEY, 1)
    if not isinstance(version, int) or version > NEWEST:
        raise UserError(
            f"{where}: of format {version!r}, and this program reads up to {NEWEST}; use the "
            "qlora_jax that wrote it, or a newer one"
        )
