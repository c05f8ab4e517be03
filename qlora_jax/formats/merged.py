"""A trained model with its adapters merged, as one more checkpoint to load or to write."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.unload import parameter
from qlora_jax.lora.linear import LoraLinear, merged
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """A `Checkpoint` of W + Δ in float32, computed tensor by tensor.

    Attributes:
      model: whose adapters are merged, and whose own weights are W.
      source: of the model: names, shapes, tokenizer.
      original: take W, and all that has no adapter, from `source`, whose values are not rounded
        to what the model holds.
    """

    model: Decoder
    source: Checkpoint
    original: bool = False
    quantization: None = None
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> DecoderConfig:
        return self.source.config

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def tokenizer_path(self) -> Path:
        return self.source.tokenizer_path

    @property
    def description(self) -> str:
        return f"{self.source.description}, merged"

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str) -> np.ndarray:
        linear, i = self._linears.get(name.removesuffix(".weight"), (None, 0))
        if linear is None:
            return self._source(name) if self.original else parameter(self.model, name)
        if self.original:
            weight = jnp.asarray(self._source(name)).T
            return np.asarray(merged(weight, linear.adapter, i).T)
        return np.asarray(linear.merge(i).T)

    def _source(self, name: str) -> np.ndarray:
        return np.asarray(self.source.read(name))

    @functools.cached_property
    def _linears(self) -> Mapping[str, tuple[LoraLinear, int]]:
        return {path: (linear, i) for path, linear, i in self.model.walk()}
