"""Turns records into batches: data sources, loss masks, packing and the resumable loader."""
