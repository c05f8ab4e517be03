"""The decoder of all families (a scan over its layers), its config, generation and plain trees."""
