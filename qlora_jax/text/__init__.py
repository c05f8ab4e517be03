"""Text to ids and back: tokenizers, chat templates, byte-pair encoding, a GGUF's vocabulary."""
