"""A .gguf file's metadata about its model."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.formats.gguf.architectures import ARCHITECTURES, Architecture
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a file about its model.

    Attributes:
      path: the file, for messages.
      architecture: `general.architecture`.
      values: key without the architecture's name to value.
    """

    path: Path
    architecture: str
    values: Mapping[str, Any]

    @property
    def kind(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def window(self) -> Any:
        """The length of sliding windows, or None."""
        return self.values.get("attention.sliding_window") or None

    @property
    def family(self) -> str:
        """The `model_type`: Mistral is llama's architecture with a window."""
        return "mistral" if self.window and self.kind.family == "llama" else self.kind.family

    def number(self, key: str, default: Any = None) -> Any:
        """Returns a positive number.

        Raises:
          UserError: the value is not a positive number.
        """
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(
                f"{self.path}: metadata {self.architecture}.{key} is {value!r}; expected a "
                "positive number"
            )
        return value
