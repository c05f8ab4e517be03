"""Programs that make the documentation's tables, and checks that take too long for a test."""
