"""Reads and writes model files of other tools: safetensors, GGUF, PEFT, bitsandbytes."""
