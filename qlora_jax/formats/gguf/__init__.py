"""Reads llama.cpp's .gguf files as checkpoints with Hugging Face names, and dequantizes them."""

from qlora_jax.formats.gguf.checkpoint import open_gguf as open_gguf
