"""What every reader of pretrained weights offers."""

from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from qlora_jax.formats.bitsandbytes import Quantization
from qlora_jax.models.config import DecoderConfig
from qlora_jax.quant import QTensor


class Checkpoint(Protocol):
    """Pretrained weights under Hugging Face names, read one tensor at a time.

    Opening one has checked that every tensor `config` asks for is there with the right shape, and
    has read no weights, but for rows of head and embedding, which are compared. A reader keeps no
    tensor and no memory map alive between reads.
    """

    @property
    def config(self) -> DecoderConfig:
        """Shapes and switches of the decoder."""

    @property
    def path(self) -> Path:
        """The folder or file the weights are in."""

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer is: a Hugging Face folder or a .gguf file."""

    @property
    def description(self) -> str:
        """What the weights are, for reports: `safetensors BF16`, `dequantized Q4_1`."""

    @property
    def quantization(self) -> Quantization | None:
        """The weights that `read` gives as they are held; None where all are floats."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user, on what of the files is not taken at its word."""

    def names(self) -> list[str]:
        """Parameter names such as `model.layers.0.self_attn.q_proj.weight`, in layer order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter; linears are [out, in]."""

    def read(self, name: str) -> np.ndarray | jax.Array | QTensor:
        """One parameter as an array of its own, linears [out, in].

        The dtype is the stored one: float32, float16 or ml_dtypes.bfloat16; block-quantized
        weights come as float32. Those of `quantization` come as the model holds them, [in, out]:
        a QTensor, or a jax array.
        """
