"""From records to batches: sources, loss masks, packing, the resumable loader."""
