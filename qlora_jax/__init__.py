"""LoRA and QLoRA fine-tuning in JAX: 4-bit weights and adapters as pure functions over pytrees."""

from qlora_jax.kernels import matmul as matmul
from qlora_jax.quant import CODEBOOKS as CODEBOOKS
from qlora_jax.quant import QTensor as QTensor
from qlora_jax.quant import dequantize as dequantize
from qlora_jax.quant import quantize as quantize
