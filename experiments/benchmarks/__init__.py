"""Programs that measure speed and memory, beside installed peers where there are some."""
