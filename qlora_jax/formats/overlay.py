"""A checkpoint some of whose tensors are replaced, as an adapter may ask for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from qlora_jax.formats.bitsandbytes import Quantization
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.models.config import DecoderConfig
from qlora_jax.quant import QTensor


@dataclasses.dataclass(frozen=True)
class Overlay:
    """The checkpoint `below`, with `replaced` tensors of the same names and shapes."""

    below: Checkpoint
    replaced: Mapping[str, np.ndarray]

    @property
    def config(self) -> DecoderConfig:
        return self.below.config

    @property
    def path(self) -> Path:
        return self.below.path

    @property
    def tokenizer_path(self) -> Path:
        return self.below.tokenizer_path

    @property
    def description(self) -> str:
        return f"{self.below.description}, {len(self.replaced)} tensors replaced by the adapter's"

    @property
    def quantization(self) -> Quantization | None:
        return self.below.quantization

    def names(self) -> list[str]:
        return self.below.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.below.shape(name)

    def read(self, name: str) -> np.ndarray | jax.Array | QTensor:
        return self.replaced[name] if name in self.replaced else self.below.read(name)
