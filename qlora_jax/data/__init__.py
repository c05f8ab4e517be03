"""Data: sources, chat templates, loss masks, packing, the resumable loader."""
