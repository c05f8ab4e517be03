"""The metadata of a .gguf file that describes its model."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.formats.gguf.architectures import ARCHITECTURES, Architecture
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a file that describes its model.

    Attributes:
      path: path of the file, for messages.
      architecture: value of `general.architecture`.
      values: key to value; the keys have no architecture prefix.
    """

    path: Path
    architecture: str
    values: Mapping[str, Any]

    @property
    def kind(self) -> Architecture:
        """The entry of `ARCHITECTURES` for this file."""
        return ARCHITECTURES[self.architecture]

    @property
    def window(self) -> Any:
        """Length of the sliding window, or None without one."""
        return self.values.get("attention.sliding_window") or None

    @property
    def family(self) -> str:
        """The `model_type`; architecture llama with a sliding window is mistral."""
        return "mistral" if self.window and self.kind.family == "llama" else self.kind.family

    def number(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, which must be a positive number.

        Raises:
          UserError: the value, or the default for a missing key, is not a positive number.
        """
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(
                f"{self.path}: metadata {self.architecture}.{key} is {value!r}; expected a "
                "positive number"
            )
        return value
