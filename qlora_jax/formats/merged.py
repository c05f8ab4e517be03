"""A trained model with its adapters merged, as one more checkpoint to load or to write."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.tying import matrices
from qlora_jax.formats.unload import parameter
from qlora_jax.lora import Adapter
from qlora_jax.lora.linear import LoraLinear, merged
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.parts import expected_shapes


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """A `Checkpoint` of W + Δ in float32, computed tensor by tensor.

    Where head and embedding are tied and one of them has an adapter, the merged two differ: the
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
        return list(expected_shapes(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._stored(name))

    def read(self, name: str) -> np.ndarray:
        if (adapter := self._outer.get(name)) is not None:
            weight = jnp.asarray(self._weight(name))
            if adapter is self.model.head_adapter:
                return np.asarray(merged(weight.T, adapter).T)
            return np.asarray(merged(weight, adapter))
        linear, i = self._linears.get(name.removesuffix(".weight"), (None, 0))
        if linear is None:
            return self._weight(name)
        if self.original:
            return np.asarray(merged(jnp.asarray(self._weight(name)).T, linear.adapter, i).T)
        return np.asarray(linear.merge(i).T)

    def _weight(self, name: str) -> np.ndarray:
        """Returns the W of one parameter, in the checkpoint's layout."""
        stored = self._stored(name)
        if self.original:
            return np.asarray(self.source.read(stored))
        return parameter(self.model, stored)

    def _stored(self, name: str) -> str:
        """Returns the tensor that holds a parameter's W: for a tied head, the embedding's."""
        embed, head = matrices(self.source.config)
        return embed if name == head and self.source.config.tie_embeddings else name

    @property
    def _unties(self) -> bool:
        return self.source.config.tie_embeddings and bool(self._outer)

    @property
    def _outer(self) -> Mapping[str, Adapter]:
        """The adapters outside the layers, by the tensor that they change."""
        embed, head = matrices(self.source.config)
        found = {embed: self.model.embed_adapter, head: self.model.head_adapter}
        return {name: adapter for name, adapter in found.items() if adapter is not None}

    @functools.cached_property
    def _linears(self) -> Mapping[str, tuple[LoraLinear, int]]:
        return {path: (linear, i) for path, linear, i in self.model.walk()}
