"""One scanned decoder for every family, its config, generation, and the model as plain trees."""
