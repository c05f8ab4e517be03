"""The interface of every reader of pretrained weights."""

from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from qlora_jax.formats.bitsandbytes import Quantization
from qlora_jax.models.config import DecoderConfig
from qlora_jax.quant import QTensor


class Checkpoint(Protocol):
    """Pretrained weights under Hugging Face names, read one tensor at a time.

    The function that opens a checkpoint checks that every tensor of `config` exists with the right
    shape. It reads no weights, except rows of head and embedding, to compare them. A reader keeps
    no tensor and no memory map between reads.
    """

    @property
    def config(self) -> DecoderConfig:
        """Shapes and switches of the decoder."""

    @property
    def path(self) -> Path:
        """Folder or file of the weights."""

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer: a Hugging Face folder or a .gguf file."""

    @property
    def description(self) -> str:
        """Storage format in words, for reports: `safetensors BF16`, `dequantized Q4_1`."""

    @property
    def quantization(self) -> Quantization | None:
        """The weights that are stored in bitsandbytes' 4 bits; None if all are floats."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user about statements of the files that the reader does not follow."""

    def names(self) -> list[str]:
        """Returns names such as `model.layers.0.self_attn.q_proj.weight`, in layer order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one parameter; linears are [out, in]."""

    def read(self, name: str) -> np.ndarray | jax.Array | QTensor:
        """Reads one parameter into a new array; linears are [out, in].

        The dtype is the stored dtype: float32, float16 or ml_dtypes.bfloat16. Block-quantized
        weights are dequantized to float32. But a weight in `quantization` has the form that the
        model holds, [in, out]: a QTensor, or a float jax array.
        """
