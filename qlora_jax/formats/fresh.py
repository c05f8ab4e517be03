"""A checkpoint of random values, from which pretraining starts."""

import dataclasses
import math
import zlib
from pathlib import Path

import numpy as np

from qlora_jax.config import PretrainConfig
from qlora_jax.formats.names import expected_shapes
from qlora_jax.models.config import DecoderConfig, Rope
from qlora_jax.runtime.errors import UserError

NAME = "from-scratch"
"""Value of `model.path` that selects this checkpoint."""

STD = 0.02
RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Endings of the names of the linears whose output is added to the residual stream."""


def shapes(pretrain: PretrainConfig) -> DecoderConfig:
    """Returns the config of the decoder that the section `pretrain` describes.

    Raises:
      UserError: 2 · heads does not divide hidden_size, or kv_heads does not divide heads.
    """
    hidden, heads = pretrain.hidden_size, pretrain.heads
    kv_heads = pretrain.kv_heads or heads
    if hidden % (2 * heads):
        raise UserError(
            f"pretrain.heads: {heads} heads do not divide hidden_size {hidden} into even parts; "
            "change one of them"
        )
    if heads % kv_heads:
        raise UserError(f"pretrain.kv_heads: {kv_heads} does not divide heads {heads}; change it")
    return DecoderConfig(
        family="llama",
        vocab_size=pretrain.vocab_size,
        hidden_size=hidden,
        intermediate_size=pretrain.intermediate_size,
        num_layers=pretrain.layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_positions=pretrain.positions,
        norm_eps=1e-5,
        rope=Rope(),
        tie_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        windows=(None,) * pretrain.layers,
    )


@dataclasses.dataclass(frozen=True)
class FreshCheckpoint:
    """A `Checkpoint` of random values: vectors are 1, matrices are drawn from N(0, 0.02²).

    The standard deviation of the linears that write to the residual stream is divided by
    sqrt(2 · layers), so that the variance does not grow with depth (GPT-2, section 2.3). The values
    of a tensor depend only on the seed and its name.
    """

    config: DecoderConfig
    seed: int
    path: Path = Path(NAME)
    description: str = "random values"
    quantization: None = None
    notes: tuple[str, ...] = ()

    @property
    def tokenizer_path(self) -> Path:
        return self.path

    def names(self) -> list[str]:
        return list(expected_shapes(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return expected_shapes(self.config)[name]

    def read(self, name: str) -> np.ndarray:
        shape = self.shape(name)
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        std = STD / math.sqrt(2 * self.config.num_layers) if name.endswith(RESIDUAL) else STD
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return random.standard_normal(shape, np.float32) * np.float32(std)
