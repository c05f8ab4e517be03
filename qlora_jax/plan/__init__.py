"""Computes a run's memory, by shapes (`ledger`) or by compiling the step (`compiled_memory`)."""
