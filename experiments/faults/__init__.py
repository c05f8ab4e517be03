"""Faults that qlora-jax must survive, a module for each part: `python -m experiments.faults`."""
