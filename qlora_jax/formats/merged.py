"""A trained model with merged adapters, as a `Checkpoint` that can be loaded or written."""

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
from qlora_jax.models.weight_shapes import expected_shapes


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """A `Checkpoint` of the merged weights W + Δ in float32, computed tensor by tensor.

    If head and embedding are tied and one of them has an adapter, the merged matrices differ. Then
    the checkpoint has the head as a separate tensor.

    Attributes:
      model: model with the adapters (Δ) and the weights W.
      source: checkpoint of the model, for names, shapes and tokenizer.
      original: whether W and all weights without an adapter come from `source`. These values are
        not rounded to 4 bits or to the dtype of the model.
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
        """Returns W of one parameter, in the layout of a checkpoint."""
        stored = self._stored(name)
        if self.original:
            return np.asarray(self.source.read(stored))
        return parameter(self.model, stored)

    def _stored(self, name: str) -> str:
        """Returns the name of the tensor that holds W; for a tied head, it is the embedding."""
        embed, head = matrices(self.source.config)
        return embed if name == head and self.source.config.tie_embeddings else name

    @property
    def _unties(self) -> bool:
        return self.source.config.tie_embeddings and bool(self._outer)

    @property
    def _outer(self) -> Mapping[str, Adapter]:
        """The adapters outside the layers, by the name of the tensor that each one changes."""
        embed, head = matrices(self.source.config)
        found = {embed: self.model.embed_adapter, head: self.model.head_adapter}
        return {name: adapter for name, adapter in found.items() if adapter is not None}

    @functools.cached_property
    def _linears(self) -> Mapping[str, tuple[LoraLinear, int]]:
        return {path: (linear, i) for path, linear, i in self.model.walk()}
