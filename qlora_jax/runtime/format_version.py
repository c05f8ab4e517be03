"""The version of the files that a run writes for itself: its manifest and its checkpoints.

A program reads all versions up to its own; files of before there were versions are of version 1.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.runtime.errors import UserError

KEY = "format"
NEWEST = 1
"""To raise when what is written changes its meaning."""


def check(values: Mapping[str, Any], where: object) -> None:
    """Raises UserError if a newer program wrote these values; `where` names them in the message."""
    version = values.get(KEY, 1)
    if not isinstance(version, int) or version > NEWEST:
        raise UserError(
            f"{where}: of format {version!r}, and this program reads up to {NEWEST}; use the "
            "qlora_jax that wrote it, or a newer one"
        )
