"""Programs that make the documentation's tables, and that check what takes a test too long."""
