"""A trained model with its adapters merged, as one more checkpoint to load or to write."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.unload import parameter
from qlora_jax.lora import Adapter
from qlora_jax.lora.linear import LoraLinear, merged
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """A `Checkpoint` of W + Δ in float32, computed tensor by tensor.

    Where head and embedding are tied and one of them has an adapter, they are no longer equal: the
    head is then a tensor of its own.

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
        config = self.source.config
        return dataclasses.replace(config, tie_embeddings=False) if self._unties else config

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
        return self.source.names() + ([self._head] if self._unties else [])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._stored(name))

    def read(self, name: str) -> np.ndarray:
        if (adapter := self._outer.get(name)) is not None:
            weight = jnp.asarray(self._weight(name))
            if name == self._head:
                return np.asarray(merged(weight.T, adapter).T)
            return np.asarray(merged(weight, adapter))
        linear, i = self._linears.get(name.removesuffix(".weight"), (None, 0))
        if linear is None:
            return self._weight(name)
        if self.original:
            return np.asarray(merged(jnp.asarray(self._weight(name)).T, linear.adapter, i).T)
        return np.asarray(linear.merge(i).T)

    def _weight(self, name: str) -> np.ndarray:
        """W of one parameter, in the checkpoint's layout."""
        stored = self._stored(name)
        if self.original:
            return np.asarray(self.source.read(stored))
        return parameter(self.model, stored)

    def _stored(self, name: str) -> str:
        """The tensor that holds the W of a parameter: for a tied head, the embedding's."""
        return self._embed if name == self._head and self.source.config.tie_embeddings else name

    @property
    def _embed(self) -> str:
        return f"{self.source.config.names.embed}.weight"

    @property
    def _head(self) -> str:
        return f"{self.source.config.names.head}.weight"

    @property
    def _unties(self) -> bool:
        return self.source.config.tie_embeddings and bool(self._outer)

    @property
    def _outer(self) -> Mapping[str, Adapter]:
        """The adapters outside the layers, by the tensor that they change."""
        found = {self._embed: self.model.embed_adapter, self._head: self.model.head_adapter}
        return {name: adapter for name, adapter in found.items() if adapter is not None}

    @functools.cached_property
    def _linears(self) -> Mapping[str, tuple[LoraLinear, int]]:
        return {path: (linear, i) for path, linear, i in self.model.walk()}
