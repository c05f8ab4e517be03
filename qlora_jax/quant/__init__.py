"""Frozen weights in 4 bits: codebooks, quantization and dequantization."""

from qlora_jax.quant.codebooks import CODEBOOKS as CODEBOOKS
from qlora_jax.quant.codebooks import codebook as codebook
from qlora_jax.quant.codebooks import derive_nf4 as derive_nf4
from qlora_jax.quant.qtensor import QTensor as QTensor
from qlora_jax.quant.qtensor import bits_per_parameter as bits_per_parameter
from qlora_jax.quant.qtensor import dequantize as dequantize
from qlora_jax.quant.qtensor import nbytes as nbytes
from qlora_jax.quant.qtensor import quantize as quantize
from qlora_jax.quant.qtensor import to_float32 as to_float32
from qlora_jax.quant.stack import QLayer as QLayer
