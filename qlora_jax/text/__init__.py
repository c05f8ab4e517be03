"""Converts text to ids and back: tokenizers, chat templates, BPE training, GGUF vocabularies."""
