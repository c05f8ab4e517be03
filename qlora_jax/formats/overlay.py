"""A checkpoint in which an adapter folder replaces some of the tensors."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from qlora_jax.formats import tying
from qlora_jax.formats.bitsandbytes import Quantization
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.weight_shapes import expected_shapes
from qlora_jax.quant import QTensor


@dataclasses.dataclass(frozen=True)
class Overlay:
    """A `Checkpoint` with the tensors of `below`, some of them replaced.

    Attributes:
      below: the original checkpoint.
      replaced: name to new value, in the shape of the original tensor.
      config: config of `below`, or a copy of it with embedding and head untied.
    """

    below: Checkpoint
    replaced: Mapping[str, np.ndarray]
    config: DecoderConfig

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

    @property
    def notes(self) -> tuple[str, ...]:
        return self.below.notes

    def names(self) -> list[str]:
        return list(expected_shapes(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return expected_shapes(self.config)[name]

    def read(self, name: str) -> np.ndarray | jax.Array | QTensor:
        if name in self.replaced:
            return self.replaced[name]
        embed, head = tying.matrices(self.config)
        untied = name == head and self.below.config.tie_embeddings
        return self.below.read(embed if untied else name)


def overlay(
    below: Checkpoint, replaced: Mapping[str, np.ndarray], *, tied: bool = False
) -> Checkpoint:
    """Returns a checkpoint with some of its tensors replaced.

    If embedding and head are tied and only one of them is replaced, the other keeps its values and
    they become untied. If both are replaced by equal values, they stay tied.

    Args:
      below: the original checkpoint.
      replaced: name to new value, in the shape of the original tensor. A tied head may be in it.
      tied: whether one replaced matrix is used for both embedding and head.
    """
    if not replaced:
        return below
    config, (embed, head) = below.config, tying.matrices(below.config)
    if not config.tie_embeddings or not replaced.keys() & {embed, head}:
        return Overlay(below, replaced, config)
    values = {n: replaced[n] if n in replaced else _array(below, embed) for n in (embed, head)}
    if tied and not replaced.keys() >= {embed, head}:
        values = dict.fromkeys(values, next(replaced[n] for n in values if n in replaced))
    first, second = (lambda start, stop, v=v: v[start:stop] for v in values.values())
    if tying.equal_rows(len(values[embed]), first, second):
        rest = {name: value for name, value in replaced.items() if name != head}
        return Overlay(below, rest | {embed: values[embed]}, config)
    return Overlay(below, replaced, dataclasses.replace(config, tie_embeddings=False))


def _array(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return np.asarray(checkpoint.read(name))
