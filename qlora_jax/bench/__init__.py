"""Benchmarks of this package on the current machine, alone or beside installed peers."""
