"""A model that was never trained, as a checkpoint to read."""

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
"""As `model.path` has it."""

STD = 0.02
RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""The linears whose output is added to the residual stream."""


def shapes(pretrain: PretrainConfig) -> DecoderConfig:
    """The decoder that the config describes.

    Raises:
      UserError: heads that do not divide what they share.
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
    """A `Checkpoint` of random values: norms are one, every matrix is normal with deviation 0.02.

    Linears that write to the residual stream are narrower by sqrt(2 * layers), so that its
    variance does not grow with depth (GPT-2, section 2.3). A tensor depends on seed and name alone.
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
