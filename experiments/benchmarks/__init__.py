"""Programs that measure speed and memory, and compare them with installed peers."""
