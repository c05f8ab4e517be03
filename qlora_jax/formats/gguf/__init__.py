"""llama.cpp's .gguf files as Hugging Face checkpoints, their weights dequantized."""

from qlora_jax.formats.gguf.checkpoint import open_gguf as open_gguf
